"""Which blocks of keys a block of queries visits, and which blocks of queries visit one of keys.

Each block of keys knows the smallest and largest position and evict_at of its keys, each block of
queries its earliest and its latest query. A pair is visited if a query may see a key by these
extremes, and takes no mask if every query sees every key by them. A plan names ranges of blocks:
from the first to the last that is visited. `plan_kernel` makes the plans of all attention kernels in
one launch. It compares every pair of blocks, which costs a thousandth of what attention does with
the pairs that it visits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.listing import CLASSES, LAST
from hamblocks_ops.selected_attention.triton.moments import LEAST, NOT_YET

FIELDS = tl.constexpr(64)
"""Entries of the plan of a block of queries, int32:

    0  begin of the blocks of keys that every query sees whole
    1  end of the blocks of keys that every query sees whole
    2  P, the number of ranges that take a mask
    3  unused
    4  begin and end of each of the P ranges: before and behind the blocks seen whole, and at most
       two for each class of keys with an end
"""
KEY_FIELDS = tl.constexpr(4)
"""Entries of the plan of a block of keys: begin of what is visited, begin and end of the blocks of
queries that see every key, end of what is visited."""
TOGETHER = tl.constexpr(16)
"""Blocks whose plans a program makes."""
COMPARED = tl.constexpr(64)
"""Blocks that they are compared with at a time."""


LEAST_POSITION, MOST_POSITION = tl.constexpr(0), tl.constexpr(1)
LEAST_EVICT_AT, MOST_EVICT_AT = tl.constexpr(2), tl.constexpr(3)
"""Numbers of the extremes of a unit of keys in int32 [4, R, units].

A slot that no query sees has the position NEVER in MOST_POSITION, so that a block with such a slot is
never taken for one that needs no mask. It counts in no other extreme.
"""


@triton.jit
def extreme(
    extremes, stream, streams, units, block, blocks, WHICH: tl.constexpr, RATIO: tl.constexpr
):  # fmt: skip
    """One of the extremes of blocks of keys, of which each is RATIO units."""
    unit = block[:, None].to(tl.int64) * RATIO + tl.arange(0, RATIO)[None, :]
    there = extremes + (stream + WHICH * streams) * units + unit
    found = tl.load(there, mask=(block < blocks)[:, None], other=0)
    if WHICH % 2:
        return tl.max(found, 1)
    return tl.min(found, 1)


@triton.jit
def asked_by(asked, batch, queries, block, BLOCK_M: tl.constexpr):
    """The earliest and the latest query of blocks of queries; NEVER and the least without one."""
    query = block[:, None].to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    there, inside = asked + batch * queries + query, query < queries
    low = tl.min(tl.load(there, mask=inside, other=NOT_YET), 1)
    return low, tl.max(tl.load(there, mask=inside, other=LEAST), 1)


@triton.jit
def add_range(here, number, begin, end, inside):
    """Writes a range behind those that are there, unless it is empty; returns how many there are."""
    some = begin < end
    tl.store(here + 4 + 2 * number, begin, mask=inside & some)
    tl.store(here + 5 + 2 * number, end, mask=inside & some)
    return number + some.to(tl.int32)


@triton.jit
def visited_range(
    extremes, stream, streams, units, first, stop, low, high, RATIO: tl.constexpr
):  # fmt: skip
    """Of the blocks of keys from `first` to `stop`, from which to which blocks of queries visit them.

    low and high are [TOGETHER, 1]; an empty range begins behind its end.
    """
    begin, end = tl.full([TOGETHER], NOT_YET, tl.int32), tl.zeros([TOGETHER], tl.int32)
    for start in range(first, stop, COMPARED):
        block = start + tl.arange(0, COMPARED)
        begins = extreme(extremes, stream, streams, units, block, stop, LEAST_POSITION, RATIO)
        ends = extreme(extremes, stream, streams, units, block, stop, MOST_EVICT_AT, RATIO)
        visited = (begins[None, :] <= high) & (ends[None, :] > low) & (block < stop)[None, :]
        number = tl.broadcast_to(block[None, :], (TOGETHER, COMPARED))
        begin = tl.minimum(begin, tl.min(tl.where(visited, number, NOT_YET), 1))
        end = tl.maximum(end, tl.max(tl.where(visited, number + 1, 0), 1))
    return begin, end


@triton.jit
def plan_queries(
    own, asked, classes, extremes, plan, queries, streams, units, HEADS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The plans of TOGETHER blocks of queries for one stream."""
    ratio: tl.constexpr = BLOCK_N // UNIT
    blocks = tl.cdiv(queries, BLOCK_M)
    groups = tl.cdiv(blocks, TOGETHER)
    stream = (own // groups).to(tl.int64)
    block_m = own % groups * TOGETHER + tl.arange(0, TOGETHER)
    low, high = asked_by(asked, stream // HEADS, queries, block_m, BLOCK_M)
    low, high = low[:, None], high[:, None]
    inside = block_m < blocks
    here = plan + (stream * blocks + block_m) * FIELDS
    of_class = classes + stream * 2 * CLASSES
    # first part: visited from `begin` to `end`, without a mask from behind the last key that ends
    # too early to before the first that begins too late
    count = tl.cdiv(tl.load(of_class + CLASSES), BLOCK_N)
    begin, end = tl.full([TOGETHER], NOT_YET, tl.int32), tl.zeros([TOGETHER], tl.int32)
    full_begin, full_end = tl.zeros([TOGETHER], tl.int32), tl.full([TOGETHER], NOT_YET, tl.int32)
    for first in range(0, count, COMPARED):
        block = first + tl.arange(0, COMPARED)
        there = (block < count)[None, :]
        begins = extreme(extremes, stream, streams, units, block, count, LEAST_POSITION, ratio)
        ends = extreme(extremes, stream, streams, units, block, count, MOST_EVICT_AT, ratio)
        begun = extreme(extremes, stream, streams, units, block, count, MOST_POSITION, ratio)
        ended = extreme(extremes, stream, streams, units, block, count, LEAST_EVICT_AT, ratio)
        number = tl.broadcast_to(block[None, :], (TOGETHER, COMPARED))
        visited = there & (begins[None, :] <= high) & (ends[None, :] > low)
        begin = tl.minimum(begin, tl.min(tl.where(visited, number, NOT_YET), 1))
        end = tl.maximum(end, tl.max(tl.where(visited, number + 1, 0), 1))
        early, late = there & (ended[None, :] <= high), there & (begun[None, :] > low)
        full_begin = tl.maximum(full_begin, tl.max(tl.where(early, number + 1, 0), 1))
        full_end = tl.minimum(full_end, tl.min(tl.where(late, number, NOT_YET), 1))
    begin = tl.minimum(begin, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    tl.store(here, full_begin, mask=inside)
    tl.store(here + 1, full_end, mask=inside)
    ranges = add_range(here, tl.zeros([TOGETHER], tl.int32), begin, full_begin, inside)
    ranges = add_range(here, ranges, full_end, end, inside)
    # second part: for every class the blocks that it has alone, then the one that it ends in and
    # shares with the next class. Their keys are of different times, so that block is a range of its
    # own, and `rest` is the first block that no range has looked at.
    rest = tl.load(of_class + 1) // BLOCK_N
    for kind in range(1, LAST):
        size = tl.load(of_class + CLASSES + kind)
        if size > 0:
            stop = tl.load(of_class + kind) + size
            alone, shared = stop // BLOCK_N, tl.cdiv(stop, BLOCK_N)
            begin, end = visited_range(
                extremes, stream, streams, units, rest, alone, low, high, ratio
            )
            ranges = add_range(here, ranges, begin, end, inside)
            begin, end = visited_range(
                extremes, stream, streams, units, tl.maximum(rest, alone), shared, low, high, ratio
            )
            ranges = add_range(here, ranges, begin, end, inside)
            rest = tl.maximum(rest, shared)
    tl.store(here + 2, ranges, mask=inside)


@triton.jit
def plan_keys(
    own, asked, extremes, plan, queries, streams, units, HEADS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The plans of TOGETHER blocks of keys of one stream."""
    ratio: tl.constexpr = BLOCK_N // UNIT
    blocks = units // ratio
    groups = tl.cdiv(blocks, TOGETHER)
    stream = (own // groups).to(tl.int64)
    block = own % groups * TOGETHER + tl.arange(0, TOGETHER)
    begins = extreme(extremes, stream, streams, units, block, blocks, LEAST_POSITION, ratio)[
        :, None
    ]
    begun = extreme(extremes, stream, streams, units, block, blocks, MOST_POSITION, ratio)[:, None]
    ended = extreme(extremes, stream, streams, units, block, blocks, LEAST_EVICT_AT, ratio)[:, None]
    ends = extreme(extremes, stream, streams, units, block, blocks, MOST_EVICT_AT, ratio)[:, None]
    begin, end = tl.full([TOGETHER], NOT_YET, tl.int32), tl.zeros([TOGETHER], tl.int32)
    full_begin, full_end = tl.zeros([TOGETHER], tl.int32), tl.full([TOGETHER], NOT_YET, tl.int32)
    count = tl.cdiv(queries, BLOCK_M)
    for first in range(0, count, COMPARED):
        block_m = first + tl.arange(0, COMPARED)
        there = (block_m < count)[None, :]
        low, high = asked_by(asked, stream // HEADS, queries, block_m, BLOCK_M)
        number = tl.broadcast_to(block_m[None, :], (TOGETHER, COMPARED))
        visited = there & (begins <= high[None, :]) & (ends > low[None, :])
        begin = tl.minimum(begin, tl.min(tl.where(visited, number, NOT_YET), 1))
        end = tl.maximum(end, tl.max(tl.where(visited, number + 1, 0), 1))
        early, late = there & (begun > low[None, :]), there & (ended <= high[None, :])
        full_begin = tl.maximum(full_begin, tl.max(tl.where(early, number + 1, 0), 1))
        full_end = tl.minimum(full_end, tl.min(tl.where(late, number, NOT_YET), 1))
    begin = tl.minimum(begin, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    here, inside = plan + (stream * blocks + block) * KEY_FIELDS, block < blocks
    tl.store(here, begin, mask=inside)
    tl.store(here + 1, full_begin, mask=inside)
    tl.store(here + 2, full_end, mask=inside)
    tl.store(here + 3, end, mask=inside)


@triton.jit
def plan_kernel(
    asked, classes, extremes, forward_plan, queries_plan, keys_plan, queries, streams, units,
    HEADS: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, QM: tl.constexpr,
    QN: tl.constexpr, KM: tl.constexpr, KN: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All plans of a call, those of the backward kernels with KEEP.

    M and N are the queries and keys of a tile of the forward kernel, QM and QN, KM and KN those of
    the kernels for the gradients of queries and keys. The programs of the three plans stand one
    behind the other in a grid of one dimension.
    """
    own = tl.program_id(0)
    forward = tl.cdiv(tl.cdiv(queries, M), TOGETHER) * streams
    if own < forward:
        plan_queries(
            own, asked, classes, extremes, forward_plan, queries, streams, units, HEADS, UNIT, M, N
        )
    if KEEP:
        backward = tl.cdiv(tl.cdiv(queries, QM), TOGETHER) * streams
        if (own >= forward) & (own < forward + backward):
            plan_queries(
                own - forward, asked, classes, extremes, queries_plan, queries, streams, units,
                HEADS, UNIT, QM, QN,
            )  # fmt: skip
        if own >= forward + backward:
            plan_keys(
                own - forward - backward, asked, extremes, keys_plan, queries, streams, units,
                HEADS, UNIT, KM, KN,
            )  # fmt: skip
