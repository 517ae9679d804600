"""Changes of a paged cache on a GPU, in few kernels and without waiting for the device."""

from __future__ import annotations

from torch import Tensor

from hamblocks_ops.append.call import Paged
from hamblocks_ops.dispatch import interpreted, without_triton

__all__ = ["Paged", "append", "lower", "runs", "show"]


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


def lower(
    table: Tensor,
    position: Tensor,
    evict_at: Tensor,
    seen: Tensor,
    wanted: Tensor,
    ends: Tensor,
    width: int,
) -> Tensor:
    """Lifetimes of the slots of all streams, lowered for the tokens that are listed.

    Args:
        table: int32 `[R, C]`, rows of any stride, entries contiguous.
        position: int32 `[P + 2, page_size]`.
        evict_at: int32 `[P + 2, page_size]`.
        seen: int32 `[N]`, tokens seen; a token that ends by then keeps its lifetime.
        wanted: int32 `[N, L, H]`, ascending positions of the tokens, -1 for none; H = R // N.
        ends: int32 `[N, L, H]`, their lifetimes.
        width: columns of the table that may hold a page.

    Returns:
        int32 `[R, width * page_size]`, 0 where there is no page.
    """
    from hamblocks_ops.append.triton import launch_lower

    until: Tensor = launch_lower(table, position, evict_at, seen, wanted, ends, width)
    return until


def show(table: Tensor, until: Tensor, evict_at: Tensor, width: int) -> Tensor:
    """Writes lifetimes to the pages of all streams, and returns `evict_at`.

    Args:
        table: as in `lower`; no page may be listed twice.
        until: int32 `[R, width * page_size]`, the lifetimes.
        evict_at: int32 `[P + 2, page_size]`, changed in place.
        width: as in `lower`.
    """
    from hamblocks_ops.append.triton import launch_show

    shown: Tensor = launch_show(table, until, evict_at, width)
    return shown
