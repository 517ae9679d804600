"""One new token per stream of a paged cache, written into reserved pages without reading a value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hamblocks_ops.dispatch import interpreted, without_triton

__all__ = ["Paged", "append", "runs"]


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


def runs(table: Tensor) -> bool:
    """Whether `append` runs on the device of a page table."""
    return without_triton(table) is None and interpreted(table) is None


def append(
    paged: Paged,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    evict_at: Tensor,
    bias: Tensor | None,
    seen: Tensor,
    until: Tensor | None,
) -> None:
    """Stores one token per stream, in place, and never waits for the device.

    A slot of a stream's page whose lifetime is at most `seen` is a hole. A token that is evicted
    after `seen` takes the first hole of its stream. If there is none the stream takes a free page,
    up to `most_pages`: the free pages of lowest index, in the order of streams. A token without a
    hole is not stored, and neither is one with a position of at least its lifetime (padding).

    Args:
        paged: the cache.
        k: `[R, W, D]`, the keys of the new tokens.
        v: `[R, W, D]`.
        position: int32 `[R]`.
        evict_at: int32 `[R]`.
        bias: `[R]`, or None as in the cache.
        seen: int32 `[N]`, tokens seen after the call.
        until: int32 `[R, S]`, new lifetimes of the stored tokens, of S slots per stream; None: they
            stay.
    """
    from hamblocks_ops.append.triton import launch

    launch(paged.table, paged, k, v, position, evict_at, bias, seen, until)
