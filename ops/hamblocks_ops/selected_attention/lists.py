"""What the Triton kernels walk: stored keys side by side, and which blocks of them a block of queries has to visit.

Keys of a sequence and head are put into one list. Those that outlive every query come first, the others behind, from
the next border of a block on; so a window neither hides in the long list nor lengthens the walk through it. Per block
the list knows the smallest and largest position and evict_at. Running extremes of these ascend, so that two binary
searches tell the first and the last block that anything in a block of queries can see, whatever the order of the keys.

Packed sequences become one: time goes on from sequence to sequence, and what a sequence stores is evicted at its end.
Nothing here waits for the device: lists are as long as they may get.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.packing import NEVER, sequence_of

FIELDS = 6
"""Entries of a plan: begin of the first part, begin and end of what needs no mask there, its end, begin and end of the
second part."""


class Times(NamedTuple):
    """When queries ask and keys are stored, on one clock.

    Attributes:
        asked: int32 [B, Tq].
        position, evict_at: int32 [B, Tk, Hkv].
        lasting: bool [B, Tk, Hkv], stored and outliving every query of its sequence.
    """

    asked: Tensor
    position: Tensor
    evict_at: Tensor
    lasting: Tensor


class Lists(NamedTuple):
    """Stored keys; R = B * Hkv lists of C slots in NB blocks.

    Attributes:
        index: int32 [R, C], the token in a slot, -1 for none.
        first: int32 [R], blocks of the first part.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody asks of a result
    first: Tensor


class Blocks(NamedTuple):
    """Extremes of every block of a list, int32 [R, NB].

    Empty slots count as position NEVER, so that their block is never seen whole, and are left out of evict_at.
    """

    least_position: Tensor
    most_position: Tensor
    least_evict_at: Tensor
    most_evict_at: Tensor


def times(
    query_position: Tensor, key_position: Tensor, evict_at: Tensor, cu_seqlens: Tensor | None
) -> Times:
    """Positions and lifetimes on one clock."""
    if cu_seqlens is None:
        end = (
            query_position.amax(1)[:, None, None] + 1
            if query_position.shape[1]
            else evict_at.new_zeros(1, 1, 1)
        )
        begun = key_position < end
        return Times(
            query_position,
            key_position,
            evict_at,
            begun & (evict_at > key_position) & (evict_at >= end),
        )
    sequence = sequence_of(cu_seqlens, query_position.shape[1])
    both = torch.cat([query_position[0, :, None], key_position[0]], 1).long()
    count = cu_seqlens.shape[0] - 1
    low = both.new_zeros(count).scatter_reduce_(
        0, sequence, both.amin(1), "amin", include_self=False
    )
    end = (
        both.new_zeros(count).scatter_reduce_(0, sequence, both.amax(1), "amax", include_self=False)
        + 1
    )
    offset = ((end - low).cumsum(0) - end)[
        sequence
    ]  # so that a sequence begins where the one before it ended
    end = end[sequence][None, :, None]
    lasting = (evict_at > key_position) & (evict_at >= end)
    shift = offset[None, :, None]
    return Times(
        (query_position + offset).to(torch.int32),
        (key_position + shift).to(torch.int32),
        (torch.minimum(evict_at.long(), end) + shift).to(torch.int32),
        lasting,
    )


def list_keys(time: Times, block: int) -> Lists:
    """Puts the stored keys into lists, in their order."""
    batch, keys, heads = time.position.shape
    stored = time.evict_at > time.position
    if time.asked.shape[1]:  # what comes after the last query is not stored yet
        stored &= time.position <= time.asked.amax(1)[:, None, None]
    lasting = time.lasting & stored
    passing = stored & ~lasting
    first = (lasting.sum(1, keepdim=True) + block - 1) // block
    capacity = (keys + block - 1) // block * block + block
    slot = torch.where(lasting, lasting.cumsum(1) - 1, first * block + passing.cumsum(1) - 1)
    slot = slot.masked_fill(~stored, capacity)
    index = torch.full((batch, heads, capacity + 1), -1, dtype=torch.int32, device=slot.device)
    token = torch.arange(keys, dtype=torch.int32, device=slot.device).expand(batch, heads, keys)
    index.scatter_(2, slot.transpose(1, 2), token)
    return Lists(index[:, :, :capacity].flatten(0, 1).contiguous(), first.flatten().to(torch.int32))


def query_blocks(asked: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest time in every block of queries, int32 [B, NQ] each."""
    short = -asked.shape[1] % block
    whole = torch.cat([asked, asked[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, block))
    return whole.amin(2), whole.amax(2)


def plan_queries(blocks: Blocks, first: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """For every list and block of queries what to visit: int32 [R, NQ, FIELDS], see there."""
    number = torch.arange(blocks.least_position.shape[1], device=first.device)
    second = number >= first[:, None]
    group = first.shape[0] // max(low.shape[0], 1)
    low, high = (x.repeat_interleave(group, 0).contiguous() for x in (low, high))
    border = first[:, None].long()

    def count(ascending: Tensor, moment: Tensor) -> Tensor:
        """How many of the first blocks are at or before a moment."""
        return torch.searchsorted(ascending.contiguous(), moment, right=True)

    def suffix_min(x: Tensor) -> Tensor:
        return x.flip(1).cummin(1).values.flip(1)

    begin = count(blocks.most_evict_at.masked_fill(second, NEVER).cummax(1).values, low)
    end = torch.minimum(
        count(suffix_min(blocks.least_position.masked_fill(second, NEVER)), high), border
    )
    begin = torch.minimum(begin, end)
    full_begin = count(suffix_min(blocks.least_evict_at.masked_fill(second, NEVER)), high)
    full_begin = torch.minimum(torch.maximum(full_begin, begin), end)
    full_end = count(blocks.most_position.masked_fill(second, NEVER).cummax(1).values, low)
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    other_begin = torch.maximum(
        count(blocks.most_evict_at.masked_fill(~second, -1).cummax(1).values, low), border
    )
    other_end = torch.maximum(count(suffix_min(blocks.least_position), high), other_begin)
    return torch.stack([begin, full_begin, full_end, end, other_begin, other_end], 2).to(
        torch.int32
    )


def plan_keys(blocks: Blocks, low: Tensor, high: Tensor) -> Tensor:
    """For every block of keys which blocks of queries see it: begin, begin and end of those that see all, end."""
    group = blocks.least_position.shape[0] // max(low.shape[0], 1)
    running_high = high.cummax(1).values.repeat_interleave(group, 0)
    running_low = low.flip(1).cummin(1).values.flip(1).repeat_interleave(group, 0).contiguous()
    begin = torch.searchsorted(running_high, blocks.least_position)
    end = torch.maximum(torch.searchsorted(running_low, blocks.most_evict_at), begin)
    full_begin = torch.minimum(
        torch.maximum(torch.searchsorted(running_low, blocks.most_position), begin), end
    )
    full_end = torch.searchsorted(running_high, blocks.least_evict_at)
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    return torch.stack([begin, full_begin, full_end, end], 2).to(torch.int32)
