"""When queries ask and keys are stored, and which keys are stored at all.

Packed sequences are put on one clock: the time of a sequence begins where that of the one before it
ended, and what a sequence stores is evicted at its end. A whole batch row is then read as one.

Nothing here waits for the device. The Triton kernels compute the same in
`selected_attention.triton.moments`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.packing import sequence_of


class Times(NamedTuple):
    """When queries ask and keys are stored, on one clock.

    Attributes:
        asked: int32 `[B, Tq]`, the time of each query.
        position: int32 `[B, Tk, Hkv]`, the time from which a key is seen.
        evict_at: int32 `[B, Tk, Hkv]`, the time from which it no longer is.
        lasting: bool `[B, Tk, Hkv]`, keys that are stored and outlive every query of their
            sequence.
    """

    asked: Tensor
    position: Tensor
    evict_at: Tensor
    lasting: Tensor


def times(
    query_position: Tensor, key_position: Tensor, evict_at: Tensor, cu_seqlens: Tensor | None
) -> Times:
    """Positions `[B, Tq]`, `[B, Tk, Hkv]` and lifetimes `[B, Tk, Hkv]`, all int32, on one clock."""
    if cu_seqlens is not None:
        return _packed_times(query_position, key_position, evict_at, cu_seqlens)
    end = evict_at.new_zeros(1, 1, 1)
    if query_position.shape[1]:
        end = query_position.amax(1)[:, None, None] + 1
    begun = key_position < end
    lasting = begun & (evict_at > key_position) & (evict_at >= end)
    return Times(query_position, key_position, evict_at, lasting)


def _packed_times(
    query_position: Tensor, key_position: Tensor, evict_at: Tensor, cu_seqlens: Tensor
) -> Times:
    """Times of a packed batch row: each sequence is shifted behind the end of the one before it."""
    sequence = sequence_of(cu_seqlens, query_position.shape[1])
    # the first and the last moment of each sequence, whether a query asks then or a key begins
    both = torch.cat([query_position[0, :, None], key_position[0]], 1).long()
    unset = both.new_zeros(cu_seqlens.shape[0] - 1)
    low = unset.scatter_reduce(0, sequence, both.amin(1), "amin", include_self=False)
    end = unset.scatter_reduce(0, sequence, both.amax(1), "amax", include_self=False) + 1
    # end + offset is the running sum of lengths, end - low, so sequences neither overlap nor leave
    # a gap
    offset = ((end - low).cumsum(0) - end)[sequence]
    end = end[sequence][None, :, None]
    lasting = (evict_at > key_position) & (evict_at >= end)
    shift = offset[None, :, None]
    return Times(
        (query_position + offset).to(torch.int32),
        (key_position + shift).to(torch.int32),
        # a key that outlives its sequence is evicted at the end of the sequence, before the next
        # one begins
        (torch.minimum(evict_at.long(), end) + shift).to(torch.int32),
        lasting,
    )


def stored_by_the_end(time: Times) -> Tensor:
    """Which keys are ever stored, bool `[B, Tk, Hkv]`.

    Keys behind the last query are not, for nothing reads them.
    """
    stored = time.evict_at > time.position
    if time.asked.shape[1]:
        stored &= time.position <= time.asked.amax(1)[:, None, None]
    return stored


def query_blocks(asked: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest time in every block of queries, int32 `[B, NQ]` each.

    Asked is `[B, Tq]`.
    """
    short = -asked.shape[1] % block
    # the last block is filled up with its last query, which changes no extreme
    whole = torch.cat([asked, asked[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, block))
    return whole.amin(2), whole.amax(2)
