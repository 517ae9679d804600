"""The tensors of a paged cache that new tokens are written to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Paged(NamedTuple):
    """The tensors of a paged cache; `append` writes to all of them but `most_pages`.

    Attributes:
        table: int32 `[R, C + 1]`, contiguous: the pages of each stream, then -1. The last column
            is no part of it.
        users: int32 `[P + 2]`, how many streams list each page; the last two entries are no pages.
        position: int32 `[P + 2, page_size]`.
        evict_at: int32 `[P + 2, page_size]`.
        bias: float32 or float64 `[P + 2, page_size]`, or None.
        slabs: k and v of each slab, `[pages + 1, page_size, W, D]`, contiguous; the last page of a
            slab is none of the P.
        seen: int32 `[N]`, tokens seen; stream r is of sequence r // (R // N).
        most_pages: int64 `[R]`, pages that each stream may have.
        width: columns of the table that may hold a page after the call.
    """

    table: Tensor
    users: Tensor
    position: Tensor
    evict_at: Tensor
    bias: Tensor | None
    slabs: list[tuple[Tensor, Tensor]]
    seen: Tensor
    most_pages: Tensor
    width: int
