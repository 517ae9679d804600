"""Three kernels that store one token per stream: plan, find free pages, write.

They are apart because a stream's new page depends on how many pages all streams before it take, and
because a page may be written to only when all streams have read who uses which page.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.append.call import Paged
from hamblocks_ops.dispatch import launches

SCANNED = 1024
"""Slots of a stream, or pages of the pool, that a program looks at together."""


@triton.jit
def plan_kernel(
    table, evict_at, until, seen, position, lifetime, most_pages, place, have, more, columns, width,
    p_r, e_r, STREAMS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, LOWERED: tl.constexpr,
):  # fmt: skip
    """Finds the slot that a stream's token takes, and whether the stream takes a page for it.

    A program owns a stream; STREAMS of them are of one sequence. It writes `place`: a slot of the
    stream, or -1; `have`: its pages; `more`: 1 if it takes a page, else 0.
    """
    stream = tl.program_id(0).to(tl.int64)
    now = tl.load(seen + stream // STREAMS)
    slots = width * PAGE
    stored, pages, hole = 0 * now, 0 * now, 0 * now + slots
    for begin in range(0, slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < slots
        page = tl.load(table + stream * columns + slot // PAGE, mask=inside, other=-1)
        there = page >= 0
        if LOWERED:
            ends = tl.load(until + stream * slots + slot, mask=there, other=0)
        else:
            ends = tl.load(evict_at + page.to(tl.int64) * PAGE + slot % PAGE, mask=there, other=0)
        lives = there & (ends > now)
        stored += tl.sum(lives.to(tl.int32), 0)
        pages += tl.sum((there & (slot % PAGE == 0)).to(tl.int32), 0)
        hole = tl.minimum(hole, tl.min(tl.where(there & (ends <= now), slot, slots), 0))
    end = tl.load(lifetime + stream * e_r)
    enters = (tl.load(position + stream * p_r) < end) & (end > now)
    # a page more if the living tokens and the new one fill all pages, up to the last reserved page
    wanted = (stored + enters.to(tl.int32) + PAGE - 1) // PAGE
    takes = enters & (wanted > pages) & (pages < tl.load(most_pages + stream))
    first = tl.where(hole < slots, hole, tl.where(takes, pages * PAGE, -1))
    tl.store(place + stream, tl.where(enters, first, -1))
    tl.store(have + stream, pages)
    tl.store(more + stream, takes.to(tl.int32))


@triton.jit
def find_kernel(users, more, found, pages, BLOCK: tl.constexpr):
    """Finds the free page that a stream takes, or -1. A program owns a stream.

    Free pages are handed out in the order of streams, those of low index first.
    """
    stream = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    page = 0 * stream - 1
    if tl.load(more + stream) > 0:
        turn = 0 * stream  # pages that the streams before this one take
        for start in range(0, stream, BLOCK):
            other = start + lane
            turn += tl.sum(tl.load(more + other, mask=other < stream, other=0), 0)
        begin, passed = 0 * stream, 0 * stream  # free pages before the block
        while (page < 0) & (begin < pages):
            index = begin + lane
            free = (tl.load(users + index, mask=index < pages, other=1) == 0).to(tl.int32)
            rank = passed + tl.cumsum(free, 0)
            hit = (free > 0) & (rank == turn + 1)
            page = tl.max(tl.where(hit, index, -1), 0)
            passed += tl.sum(free, 0)
            begin += BLOCK
    tl.store(found + stream, page)


@triton.jit
def append_kernel(
    table, users, position_of, evict_at, bias_of, keys, values, seen_of, k, v, position, lifetime,
    bias, seen, until, place, have, found, columns, width, begin, pages, p_r, e_r, b_r, STREAMS: tl.constexpr,
    PAGE: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LOWERED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Writes a stream's token into one slab, [begin, begin + pages) of all pages.

    A program owns a stream. FIRST: the first slab, for which the program also writes what spans all
    slabs. ENTRIES are those of a key in a page, W * D; WIDTH and SLOTS are the powers of 2 from
    ENTRIES and PAGE on.
    """
    stream = tl.program_id(0).to(tl.int64)
    slots = width * PAGE
    slot, old, new = tl.load(place + stream), tl.load(have + stream), tl.load(found + stream)
    column = tl.maximum(slot, 0) // PAGE
    page = tl.load(table + stream * columns + column)
    page = tl.where(column == old, new, page)  # the table may not list the new page yet
    stores = (slot >= 0) & (page >= 0)
    page, offset = page.to(tl.int64), slot % PAGE
    if FIRST:
        end = tl.load(lifetime + stream * e_r)
        if LOWERED:
            # all lifetimes of the stream anew; the new token's below, in a store of its own
            for start in range(0, slots, BLOCK):
                other = start + tl.arange(0, BLOCK)
                inside = (other < slots) & (other != slot)
                own = tl.load(table + stream * columns + other // PAGE, mask=inside, other=-1)
                inside = inside & (own >= 0) & (other < old * PAGE)
                at = own.to(tl.int64) * PAGE + other % PAGE
                ends = tl.load(until + stream * slots + other, mask=inside, other=0)
                tl.store(evict_at + at, ends, mask=inside)
        if new >= 0:
            # its slots are holes, whatever the page held before
            lane = tl.arange(0, SLOTS)
            empty = (lane < PAGE) & ((lane != offset) | (column != old))
            tl.store(evict_at + new.to(tl.int64) * PAGE + lane, 0, mask=empty)
            tl.store(users + new, 1)
            tl.store(table + stream * columns + old, new)
        at = page * PAGE + offset
        tl.store(position_of + at, tl.load(position + stream * p_r), mask=stores)
        tl.store(evict_at + at, end, mask=stores)
        if HAS_BIAS:
            tl.store(bias_of + at, tl.load(bias + stream * b_r), mask=stores)
        if stream % STREAMS == 0:
            tl.store(seen_of + stream // STREAMS, tl.load(seen + stream // STREAMS))
    here = stores & (page >= begin) & (page < begin + pages)
    entry = tl.arange(0, WIDTH)
    inside = here & (entry < ENTRIES)
    source, target = stream * ENTRIES + entry, ((page - begin) * PAGE + offset) * ENTRIES + entry
    tl.store(keys + target, tl.load(k + source, mask=inside, other=0.0), mask=inside)
    tl.store(values + target, tl.load(v + source, mask=inside, other=0.0), mask=inside)


@launches
def launch(
    table: Tensor,
    paged: Paged,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    evict_at: Tensor,
    bias: Tensor | None,
    seen: Tensor,
    until: Tensor | None,
) -> None:
    """See `hamblocks_ops.append.append`; `table` is that of `paged`, whose device is launched on."""
    streams, columns = table.shape
    pages, size = paged.users.shape[0] - 2, paged.position.shape[1]
    place, have, more, found = table.new_empty(4, streams).unbind()
    own = streams // len(seen)
    width = paged.width
    p_r, e_r, b_r = position.stride(0), evict_at.stride(0), 0 if bias is None else bias.stride(0)
    if until is not None:
        until = until.contiguous()
    plan_kernel[(streams,)](
        table, paged.evict_at, until, seen, position, evict_at, paged.most_pages, place, have, more,
        columns, width, p_r, e_r, STREAMS=own, PAGE=size, BLOCK=SCANNED, LOWERED=until is not None,
    )  # fmt: skip
    find_kernel[(streams,)](paged.users, more, found, pages, BLOCK=SCANNED)
    begin, entries = 0, k.shape[1] * k.shape[2]
    for keys, values in paged.slabs:
        in_slab = keys.shape[0] - 1
        append_kernel[(streams,)](
            table, paged.users, paged.position, paged.evict_at, paged.bias, keys, values, paged.seen,
            k, v, position, evict_at, bias, seen, until, place, have, found, columns, width, begin,
            in_slab, p_r, e_r, b_r, STREAMS=own, PAGE=size, ENTRIES=entries,
            WIDTH=triton.next_power_of_2(entries), SLOTS=triton.next_power_of_2(size), BLOCK=SCANNED,
            FIRST=begin == 0, LOWERED=until is not None, HAS_BIAS=bias is not None,
        )  # fmt: skip
        begin += in_slab


@triton.jit
def lower_kernel(
    table, position_of, evict_at, seen, wanted, ends, until, columns, width, listed, w_n, w_l, w_h,
    e_n, e_l, e_h, STREAMS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Lifetimes of a block of slots of a stream, lowered where its tokens are listed.

    The grid is [R, blocks]. `wanted` lists positions in ascending order, `listed` of them; a binary
    search of STEPS steps finds a slot's position. A hole keeps its lifetime.
    """
    stream = tl.program_id(0).to(tl.int64)
    sequence, own = stream // STREAMS, stream % STREAMS
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < width * PAGE
    page = tl.load(table + stream * columns + slot // PAGE, mask=inside, other=-1)
    there = page >= 0
    at = page.to(tl.int64) * PAGE + slot % PAGE
    end = tl.load(evict_at + at, mask=there, other=0)
    place = tl.load(position_of + at, mask=there, other=-1)
    there = there & (end > tl.load(seen + sequence))
    list_of = wanted + sequence * w_n + own * w_h
    # the first listed position that is not below that of the slot lies in [low, high]
    low, high = slot * 0, slot * 0 + listed
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        apart = there & (low < high)
        below = tl.load(list_of + middle.to(tl.int64) * w_l, mask=apart, other=0) < place
        low = tl.where(apart & below, middle + 1, low)
        high = tl.where(apart & (below == 0), middle, high)
    there = there & (low < listed)
    found = tl.load(list_of + low.to(tl.int64) * w_l, mask=there, other=-1)
    there = there & (found == place) & (place >= 0)
    lowered = ends + sequence * e_n + own * e_h + low.to(tl.int64) * e_l
    end = tl.where(there, tl.load(lowered, mask=there, other=0), end)
    tl.store(until + stream * width * PAGE + slot, end, mask=inside)


@triton.jit
def show_kernel(
    table, until, evict_at, columns, width, PAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes lifetimes by stream to the pages of the streams. The grid is [R, blocks]."""
    stream = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < width * PAGE
    page = tl.load(table + stream * columns + slot // PAGE, mask=inside, other=-1)
    end = tl.load(until + stream * width * PAGE + slot, mask=inside, other=0)
    at = page.to(tl.int64) * PAGE + slot % PAGE
    tl.store(evict_at + at, end, mask=page >= 0)


@launches
def launch_lower(
    table: Tensor,
    position: Tensor,
    evict_at: Tensor,
    seen: Tensor,
    wanted: Tensor,
    ends: Tensor,
    width: int,
) -> Tensor:
    """See `hamblocks_ops.append.lower`."""
    streams, size = len(table), position.shape[1]
    until = evict_at.new_empty(streams, width * size)
    if until.numel():
        listed = wanted.shape[1]
        lower_kernel[(streams, triton.cdiv(width * size, SCANNED))](
            table, position, evict_at, seen, wanted, ends, until, table.stride(0), width, listed,
            *wanted.stride(), *ends.stride(), STREAMS=streams // len(seen), PAGE=size,
            BLOCK=SCANNED, STEPS=listed.bit_length(),
        )  # fmt: skip
    return until


@launches
def launch_show(table: Tensor, until: Tensor, evict_at: Tensor, width: int) -> Tensor:
    """See `hamblocks_ops.append.show`."""
    streams, size = len(table), evict_at.shape[1]
    if streams * width:
        show_kernel[(streams, triton.cdiv(width * size, SCANNED))](
            table, until.contiguous(), evict_at, table.stride(0), width, PAGE=size, BLOCK=SCANNED
        )
    return evict_at
