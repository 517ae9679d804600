"""The tokens that are ever stored, side by side: what a cache holds of a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import check_integer, check_tensor, values_are_checked, wrong
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    always,
    explain_table,
    interpreted,
    pick,
    without_triton,
)
from hamblocks_ops.select import check_count, placed


class Compacted(NamedTuple):
    """The stored tokens of every row and head, in order, without gaps.

    Attributes:
        index: int32 `[B, H, L]`: where the token stands in the row; T behind the last one.
        position: int32 `[B, H, L]`: its position within its sequence; NEVER behind the last one, so no query sees it.
        evict_at: int32 `[B, H, L]`: its lifetime; 0 behind the last one.
        lengths: int32 `[N, H]`: how many tokens of each sequence are stored. In a packed batch the sequences follow
            each other in the one row.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody asks of a result
    position: Tensor
    evict_at: Tensor
    lengths: Tensor


class CompactCall(NamedTuple):
    """One checked call: what an implementation is given.

    Attributes:
        evict_at: integers `[B, T, H]`.
        position: int64 `[B, T, H]`, of any strides.
        sequence: int64 `[T]`, the sequence of every token in a packed batch.
        sequences: how many there are.
        capacity: length of the lists.
    """

    evict_at: Tensor
    position: Tensor
    sequence: Tensor | None
    sequences: int
    capacity: int


def compact(
    evict_at: Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
    impl: str = "auto",
) -> Compacted:
    """Lists the tokens that are ever stored (evict_at > position), in order, for every row and head.

    Args:
        evict_at: int32 `[B, T, H]`.
        position: as in `select_threshold`.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.
        capacity: length L of the lists; None: the longest list, which is read from the device. With it, and where
            values are not checked, nothing waits for the device.
        impl: "triton" (a GPU, two kernels), "scatter" (torch, any device), or "auto".

    Returns:
        Compacted lists of length L.

    Raises:
        ValueError: a bad argument, or (where values are checked) more tokens stored than `capacity`.
        UnsupportedError: `impl` cannot run this call.
    """
    call = _checked(evict_at, position, cu_seqlens, capacity)
    index, where, until, lengths = pick("compact", TABLE, impl, call)(call)
    return Compacted(index, where, until, lengths)


def explain(
    evict_at: Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
) -> Explanation:
    """Every implementation of `compact` with "yes", or the reason why it cannot run this call."""
    return explain_table(TABLE, _checked(evict_at, position, cu_seqlens, capacity))


def _checked(
    evict_at: Tensor, position: Tensor | None, cu_seqlens: Tensor | None, capacity: int | None
) -> CompactCall:
    check_tensor("evict_at", evict_at, "[B, T, H]", [None] * 3)
    check_integer("evict_at", evict_at)
    where, sequence = placed(evict_at, position, cu_seqlens)
    if capacity is None:
        counts = (evict_at > where).sum(1)
        capacity = int(counts.max()) if counts.numel() else 0
    else:
        check_count("capacity", capacity)
        if values_are_checked(evict_at) and evict_at.numel():
            most = int((evict_at > where).sum(1).max())
            if most > capacity:
                raise wrong(
                    "capacity", f"at least the {most} tokens that are stored", str(capacity)
                )
    sequences = evict_at.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return CompactCall(evict_at, where, sequence, sequences, capacity)


def lengths_of(call: CompactCall) -> Tensor:
    """How many tokens of each sequence are stored, int32 `[N, H]`."""
    stored = call.evict_at > call.position
    if call.sequence is None:
        return stored.sum(1, dtype=torch.int32)
    lengths = torch.zeros(call.sequences, stored.shape[2], dtype=torch.int32, device=stored.device)
    return lengths.index_add(0, call.sequence, stored[0].to(torch.int32))


def _run_triton(call: CompactCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hamblocks_ops.compact.triton import lists

    index, where, until, counts = lists(call.evict_at, call.position, call.capacity)
    return index, where, until, counts if call.sequence is None else lengths_of(call)


def _run_scatter(call: CompactCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hamblocks_ops.compact.scatter import lists

    return *lists(call.evict_at, call.position, call.capacity), lengths_of(call)


TABLE = (
    Implementation(
        "triton", lambda call: without_triton(call.evict_at), lambda: _run_triton, interpreted
    ),
    Implementation("scatter", always, lambda: _run_scatter),
)
