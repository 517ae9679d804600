"""Keys and values in pages, and the same as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import check_floating, check_integer, check_range, check_tensor, wrong
from hamblocks_ops.packing import NEVER, int32


class Pages(NamedTuple):
    """P pages of keys and values, each for W key/value heads that are stored and evicted together.

    Query t sees a slot iff position <= t < evict_at. A slot that no query sees may hold anything,
    NaN included. An empty slot has evict_at = 0.

    Attributes:
        k: `[P, page, W, D]`, any floating dtype.
        v: `[P, page, W, D]`, same dtype.
        position: int32 `[P, page]`.
        evict_at: int32 `[P, page]`.
        logit_bias: `[P, page]`, float32 (float64 for float64 keys), added to the logits of a slot;
            -inf hides it.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None = None


class PagedRows(NamedTuple):
    """What the page tables list, in the order of the tables: S = M * page slots for each stream.

    Attributes:
        k: `[N, S, Hkv, D]`, 0 where a page is missing.
        v: `[N, S, Hkv, D]`, 0 where a page is missing.
        position: int32 `[N, S, H]`, NEVER where a page is missing.
        evict_at: int32 `[N, S, H]`, 0 where a page is missing.
        logit_bias: `[N, S, H]`, 0 where a page is missing; None without one.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None


class PageMemo:
    """What an implementation works out from page tables, kept for later calls by their owner.

    It belongs to one page table and to slabs of the same sizes, and is used only with these: after
    a change of any of them the owner makes a new one. Keys, values, positions, lifetimes and
    queries may differ from call to call.

    Attributes:
        plan: what the implementation "pages" keeps.
    """

    __slots__ = ("plan",)

    def __init__(self) -> None:
        self.plan: Any = None


class PagedCall(NamedTuple):
    """One call of `paged_attention`: at least one slab; query_position is NEVER for padding."""

    q: Tensor
    slabs: Sequence[Pages]
    block_table: Tensor
    query_position: Tensor
    scale: float
    shared: bool | None
    memo: PageMemo | None = None


def unpage(slabs: Sequence[Pages], block_table: Tensor) -> PagedRows:
    """What the page tables list, copied into the padded tensors that `selected_attention` takes.

    Reads the block table on the host, which waits for its device.

    Args:
        slabs: one or more; pages are counted through all of them. Where they differ in page size,
            shorter pages are filled up as if the rest of the page were missing.
        block_table: int32 or int64 `[N, H, M]`, the page table of every stream, -1 for no page.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
    """
    check_slabs(slabs)
    if not slabs:
        raise wrong("slabs", "at least one slab, for its sizes", slabs)
    check_table(block_table, slabs, slabs[0].k)
    table = block_table.flatten()
    page = max(slab.k.shape[1] for slab in slabs)
    k, v, _, _, bias = (
        None if x is None else x.new_zeros(len(table), page, *x.shape[2:]) for x in slabs[0]
    )
    position = torch.full((len(table), page), NEVER, dtype=torch.int32, device=table.device)
    padded = k, v, position, torch.zeros_like(position), bias
    begin = 0
    for slab in slabs:
        pages, size = slab.position.shape
        entry = ((table >= begin) & (table < begin + pages)).nonzero()[:, 0]
        place = table[entry] - begin
        for whole, part in zip(padded, slab, strict=True):
            if whole is not None and part is not None:
                listed = part.index_select(0, place)
                listed = listed.to(whole.dtype) if part.is_floating_point() else int32(listed)
                whole[:, :size].index_copy_(0, entry, listed)
        begin += pages
    result = (None if x is None else _by_sequence(x, block_table) for x in padded)
    return PagedRows(*result)  # type: ignore[arg-type]


def _by_sequence(x: Tensor, block_table: Tensor) -> Tensor:
    """`[N * H * M, page, ...]` -> `[N, M * page, H, ...]`; k and v -> `[N, M * page, H * W, D]`."""
    x = x.unflatten(0, block_table.shape).movedim(1, 3).flatten(1, 2)
    return x.flatten(2, 3) if x.dim() > 3 else x


def users(table: Tensor, pages: int) -> Tensor:
    """How many entries of the page tables list each page, int32 `[pages + 1]`.

    The last entry counts -1.
    """
    page = torch.where(table < 0, pages, table).flatten()
    return torch.zeros(pages + 1, dtype=torch.int32, device=table.device).index_add_(
        0, page, torch.ones_like(page, dtype=torch.int32)
    )


def total(slabs: Sequence[Pages]) -> int:
    """The number of pages in all slabs."""
    return sum(slab.k.shape[0] for slab in slabs)


def check_slabs(slabs: object, like: Tensor | None = None) -> None:
    """Checks types, shapes, dtypes and devices of slabs, also against `like`, `[..., D]`."""
    if not isinstance(slabs, Sequence) or not all(isinstance(slab, Pages) for slab in slabs):
        raise wrong("slabs", "a sequence of Pages", slabs)
    for index, slab in enumerate(slabs):
        name, first = f"slabs[{index}]", slabs[0]
        heads = first.k.shape[2] if index else None
        dim = first.k.shape[3] if index else None if like is None else like.shape[-1]
        like = first.k if index and like is None else like
        check_tensor(f"{name}.k", slab.k, "[P, page, W, D]", [None, None, heads, dim], like=like)
        check_floating(f"{name}.k", slab.k, like=like)
        check_tensor(f"{name}.v", slab.v, "[P, page, W, D]", [*slab.k.shape], like=slab.k)
        check_floating(f"{name}.v", slab.v, like=slab.k)
        for field in ("position", "evict_at"):
            value = getattr(slab, field)
            check_tensor(f"{name}.{field}", value, "[P, page]", [*slab.k.shape[:2]], like=slab.k)
            check_integer(f"{name}.{field}", value)
        if slab.logit_bias is not None:
            check_tensor(
                f"{name}.logit_bias", slab.logit_bias, "[P, page]", [*slab.k.shape[:2]], like=slab.k
            )
            check_floating(f"{name}.logit_bias", slab.logit_bias)
        if (slab.logit_bias is None) != (first.logit_bias is None):
            expected = "None" if first.logit_bias is None else "a bias"
            raise wrong(f"{name}.logit_bias", f"{expected}, as in slabs[0]", slab.logit_bias)


def check_table(
    block_table: Tensor, slabs: Sequence[Pages], like: Tensor, sequences: int | None = None
) -> None:
    """Checks `[N, H, M]` integers from -1 to the number of the last page."""
    check_tensor("block_table", block_table, "[N, H, M]", [sequences, None, None], like=like)
    check_integer("block_table", block_table)
    check_range("block_table", block_table, -1, total(slabs) - 1)
