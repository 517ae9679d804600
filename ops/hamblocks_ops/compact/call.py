"""What an implementation of `compact` is given, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CompactCall(NamedTuple):
    """One call of `compact`.

    Attributes:
        evict_at: int32 `[B, T, H]`.
        position: int64 `[B, T, H]`, of any strides.
        sequence: int64 `[T]`, the sequence of every token of a packed batch; None without packing.
        sequences: N, the number of sequences.
        capacity: L, the length of the lists.
    """

    evict_at: Tensor
    position: Tensor
    sequence: Tensor | None
    sequences: int
    capacity: int


class Compacted(NamedTuple):
    """The stored tokens of every batch row and head, in order, without gaps.

    Attributes:
        index: int32 `[B, H, L]`: where the token stands in its batch row; T behind the last one.
        position: int32 `[B, H, L]`: its position within its sequence; NEVER behind the last one, so
            no query sees what stands there.
        evict_at: int32 `[B, H, L]`: its lifetime; 0 behind the last one.
        lengths: int32 `[N, H]`: how many tokens of each sequence are stored. In a packed batch the
            sequences follow each other in one list.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    position: Tensor
    evict_at: Tensor
    lengths: Tensor


def lengths_of(call: CompactCall) -> Tensor:
    """How many tokens of each sequence are stored, int32 `[N, H]`."""
    stored = call.evict_at > call.position
    if call.sequence is None:
        return stored.sum(1, dtype=torch.int32)
    lengths = torch.zeros(call.sequences, stored.shape[2], dtype=torch.int32, device=stored.device)
    return lengths.index_add(0, call.sequence, stored[0].to(torch.int32))
