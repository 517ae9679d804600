"""Lists of stored keys, and which blocks of them a block of queries has to visit.

The Triton kernels do not walk all keys. The stored keys of every stream (one batch row, one
key/value head) are put side by side into one list, which is cut into blocks of a fixed size. A list
has two parts, each padded to a whole block:

1. keys that outlive every query, in their order;
2. keys that are evicted before the last query, in their order.

The parts are apart because their visits differ. A query block sees everything in the first part up
to its own position, and most of that without a mask. Of the second part it sees the few keys whose
lifetimes reach it: with a sliding window that is a short run, which would be spread over the whole
list if both kinds stood mixed.

Each block knows the smallest and largest position and evict_at of its keys. Keys need not stand in
the order of time (a cache may hold them in any order), so positions in a list may go up and down.
Running extremes along the list never go down, and a binary search in those tells the first and the
last block that any query of a block can see.

Packed sequences are put on one clock: the time of a sequence begins where that of the one before it
ended, and what a sequence stores is evicted at its end. One list then serves the whole batch row.

Nothing here waits for the device: lists have the largest length that the shapes allow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.compact.listing import place
from hamblocks_ops.packing import NEVER, sequence_of

FIELDS = 6
"""Entries of a plan, all of them numbers of blocks of a list:

    0  begin of what is visited in the first part
    1  begin of the blocks that every query sees whole, which need no mask
    2  end of the blocks that every query sees whole
    3  end of what is visited in the first part
    4  begin of what is visited in the second part
    5  end of what is visited in the second part
"""


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


class Lists(NamedTuple):
    """Stored keys: R = B * Hkv lists of C slots in NB blocks.

    Attributes:
        index: int32 `[R, C]`, the token in a slot, -1 for padding.
        first: int32 `[R]`, the number of blocks of the first part.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    first: Tensor


class Blocks(NamedTuple):
    """Extremes of every block of a list, int32 `[R, NB]` each.

    Padding counts as position NEVER, so that a block with padding is never taken for one that needs
    no mask. It does not count for evict_at.
    """

    least_position: Tensor
    most_position: Tensor
    least_evict_at: Tensor
    most_evict_at: Tensor


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


def list_keys(time: Times, block: int) -> Lists:
    """Puts the stored keys into lists of two parts, each in the order of the keys.

    Args:
        time: positions and lifetimes.
        block: slots of a block; the second part begins at a multiple of it.
    """
    keys = time.position.shape[1]
    stored = stored_by_the_end(time)
    lasting = time.lasting & stored
    passing = stored & ~lasting
    # a running count gives the place of a key within its part
    first = (lasting.sum(1, keepdim=True) + block - 1) // block
    slot = torch.where(lasting, _count(lasting) - 1, first * block + _count(passing) - 1)
    # one block more than the keys fill: each part may end with a block that is not full
    capacity = (keys + block - 1) // block * block + block
    slot = slot.masked_fill(~stored, capacity)
    token = torch.arange(keys, dtype=torch.int32, device=slot.device)[None, :, None]
    index = place(token, slot, capacity, fill=-1)
    return Lists(index.flatten(0, 1).contiguous(), first.flatten().to(torch.int32))


def _count(x: Tensor) -> Tensor:
    """The running count along the tokens of `[B, Tk, Hkv]`.

    Scanned as a contiguous `[B, Hkv, Tk]`: on a GPU a scan over any other dimension than the last
    is sequential.
    """
    return x.transpose(1, 2).contiguous().cumsum(2).transpose(1, 2)


def query_blocks(asked: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest time in every block of queries, int32 `[B, NQ]` each.

    Asked is `[B, Tq]`.
    """
    short = -asked.shape[1] % block
    # the last block is filled up with its last query, which changes no extreme
    whole = torch.cat([asked, asked[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, block))
    return whole.amin(2), whole.amax(2)


def plan_queries(blocks: Blocks, first: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What every block of queries visits in every list.

    Args:
        blocks: extremes of the blocks of keys.
        first: int32 `[R]`, the number of blocks of the first part.
        low: int32 `[B, NQ]`, the earliest query of a block.
        high: int32 `[B, NQ]`, the latest.

    Returns:
        int32 `[R, NQ, FIELDS]`. The ranges are bounds: a block within may still be seen by no
        query.
    """
    number = torch.arange(blocks.least_position.shape[1], device=first.device)
    second = number >= first[:, None]
    group = first.shape[0] // max(low.shape[0], 1)
    low, high = (x.repeat_interleave(group, 0).contiguous() for x in (low, high))
    border = first[:, None].long()

    def count(ascending: Tensor, moment: Tensor) -> Tensor:
        """How many of the first blocks are at or before a moment."""
        return torch.searchsorted(ascending.contiguous(), moment, right=True)

    # First part. In each search the blocks of the second part get a value that does not move the
    # result. visited: behind the run of blocks whose keys have all ended by `low`, before those
    # that begin after `high`
    begin = count(_running_max(blocks.most_evict_at.masked_fill(second, NEVER)), low)
    end = count(_suffix_min(blocks.least_position.masked_fill(second, NEVER)), high)
    end = torch.minimum(end, border)
    begin = torch.minimum(begin, end)
    # without a mask: every key has begun by `low` and ends after `high`
    full_begin = count(_suffix_min(blocks.least_evict_at.masked_fill(second, NEVER)), high)
    full_begin = torch.minimum(torch.maximum(full_begin, begin), end)
    full_end = count(_running_max(blocks.most_position.masked_fill(second, NEVER)), low)
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    # second part: the same bounds; here every block takes a mask
    other_begin = count(_running_max(blocks.most_evict_at.masked_fill(~second, -1)), low)
    other_begin = torch.maximum(other_begin, border)
    other_end = torch.maximum(count(_suffix_min(blocks.least_position), high), other_begin)
    return torch.stack([begin, full_begin, full_end, end, other_begin, other_end], 2).to(
        torch.int32
    )


def plan_keys(blocks: Blocks, low: Tensor, high: Tensor) -> Tensor:
    """Which blocks of queries see a block of keys: the plan of the backward pass.

    Args:
        blocks: extremes of the blocks of keys.
        low: int32 `[B, NQ]`, the earliest query of a block.
        high: int32 `[B, NQ]`, the latest.

    Returns:
        int32 `[R, NB, 4]`: begin, begin and end of the blocks of queries that see every key, end.
    """
    group = blocks.least_position.shape[0] // max(low.shape[0], 1)
    running_high = _running_max(high).repeat_interleave(group, 0)
    running_low = _suffix_min(low).repeat_interleave(group, 0).contiguous()
    # visited: from the first query at or after the earliest key, to the last before the last key
    # ends
    begin = torch.searchsorted(running_high, blocks.least_position)
    end = torch.maximum(torch.searchsorted(running_low, blocks.most_evict_at), begin)
    # without a mask: from the last key's position on, until the first key ends
    full_begin = torch.searchsorted(running_low, blocks.most_position)
    full_begin = torch.minimum(torch.maximum(full_begin, begin), end)
    full_end = torch.searchsorted(running_high, blocks.least_evict_at)
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    return torch.stack([begin, full_begin, full_end, end], 2).to(torch.int32)


def _running_max(x: Tensor) -> Tensor:
    """The largest of each entry and those before it."""
    return x.cummax(1).values


def _suffix_min(x: Tensor) -> Tensor:
    """The smallest of each entry and those behind it."""
    return x.flip(1).cummin(1).values.flip(1)
