"""Kernels that put the stored keys of every stream (one batch row, one key/value head) into a list.

Every token gets a slot of the list. The list is in classes, one behind the other, and each class is
in the order of the tokens:

- class 0, the first part: keys that outlive every query. It is padded to a whole block.
- classes 1 to LAST - 1, the second part: keys that are evicted before the last query, by the binary
  logarithm of their lifetime. A query sees those of a class whose positions lie within the longest
  lifetime of the class: a run of blocks, most of which it really sees. In one list by position,
  a few long-lived keys would make it visit all blocks.
- class LAST: tokens that no query sees. They are not copied. They are listed so that the kernel that
  writes the gradients of the listed keys writes zeros for them.

A program owns TOKENS tokens of a stream. `count_kernel` counts each class. `write_kernel` sums the
counts of the programs before its own, which gives the slot of its first token of each class, and
writes from there. Programs write disjoint slots, so the result does not depend on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.moments import NOT_YET, sequence_of

CLASSES = tl.constexpr(16)
"""Classes of a list; a power of two."""
LAST = tl.constexpr(15)
"""The class of tokens that no query sees."""
SHORT = tl.constexpr(64)
"""Lifetimes below this are one class: about a block of keys. Each further class doubles it."""


@triton.jit
def class_of(begins, ends, start, end, inside):
    """The class of tokens; CLASSES, which is none, where there is no token."""
    stored = (ends > begins) & (begins < end) & (ends > start)
    lifetime = ends - begins
    kind = tl.full(lifetime.shape, 1, tl.int32)
    for power in tl.static_range(13):
        kind += (lifetime >= (SHORT << power)).to(tl.int32)
    kind = tl.where(ends >= end, 0, kind)
    return tl.where(inside, tl.where(stored, kind, LAST), CLASSES)


@triton.jit
def tokens_of(
    position, evict_at, cu_seqlens, spans, shifts, p_b, p_t, p_h, e_b, e_t, e_h, tokens, sequences,
    steps, batch, head, block, TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Position and end on the clock, int64, and class of a program's tokens [TOKENS]."""
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    begins = tl.load(position + batch * p_b + token * p_t + head * p_h, mask=inside, other=0)
    ends = tl.load(evict_at + batch * e_b + token * e_t + head * e_h, mask=inside, other=0)
    begins, ends = begins.to(tl.int64), ends.to(tl.int64)
    sequence = sequence_of(token, cu_seqlens, sequences, steps) if PACKED else token * 0 + batch
    start, end = tl.load(spans + sequence), tl.load(spans + sequences + sequence)
    if PACKED:
        # a key that outlives its sequence is evicted at the end of the sequence, before the next
        # one begins
        ends = tl.minimum(ends, end)
    kind = class_of(begins, ends, start, end, inside)
    if PACKED:
        shift = tl.load(shifts + sequence)
        begins, ends = begins + shift, ends + shift
    return begins, ends, kind


@triton.jit
def one_hot(kind):
    """Which class each token is of, int32 [TOKENS, CLASSES]."""
    return (kind[:, None] == tl.arange(0, CLASSES)[None, :]).to(tl.int32)


@triton.jit
def count_kernel(
    query_position, position, evict_at, cu_seqlens, spans, shifts, asked, counts, q_b, q_t, p_b, p_t,
    p_h, e_b, e_t, e_h, queries, tokens, sequences, steps, rows, blocks, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """How many tokens of a program are of each class: counts [R, blocks, CLASSES].

    The first `rows` * cdiv(queries, TOKENS) programs write asked [B, Tq] instead: the time of each
    query.
    """
    own = tl.program_id(0)
    parts = tl.cdiv(queries, TOKENS)
    if own < rows * parts:
        batch, token = (own // parts).to(tl.int64), own % parts * TOKENS + tl.arange(0, TOKENS)
        token = token.to(tl.int64)
        inside = token < queries
        asks = tl.load(query_position + batch * q_b + token * q_t, mask=inside, other=0)
        if PACKED:
            sequence = sequence_of(token, cu_seqlens, sequences, steps)
            asks = (asks.to(tl.int64) + tl.load(shifts + sequence)).to(tl.int32)
        tl.store(asked + batch * queries + token, asks, mask=inside)
    else:
        own -= rows * parts
        stream, block = (own // blocks).to(tl.int64), own % blocks
        _, _, kind = tokens_of(
            position, evict_at, cu_seqlens, spans, shifts, p_b, p_t, p_h, e_b, e_t, e_h, tokens,
            sequences, steps, stream // HEADS, stream % HEADS, block, TOKENS, PACKED,
        )  # fmt: skip
        there = counts + (stream * blocks + block) * CLASSES + tl.arange(0, CLASSES)
        tl.store(there, tl.sum(one_hot(kind), 0))


@triton.jit
def write_kernel(
    position, evict_at, cu_seqlens, spans, shifts, counts, times, classes, p_b, p_t, p_h, e_b, e_t,
    e_h, tokens, sequences, steps, blocks, programs, slots, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, COUNTS: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Writes a program's tokens, and the padding of the slots with the program's numbers.

    The grid is [R * programs]; the programs beyond the last tokens write padding alone.

    Args:
        times: int32 [3, R, slots]: the token in a slot, -1 for padding; its position, NEVER for
            what no query sees; its evict_at, -1 for what no query sees.
        classes: int32 [R, 2, CLASSES]: the first slot of every class, and its tokens.
    """
    own = tl.program_id(0)
    stream, block = (own // programs).to(tl.int64), own % programs
    begins, ends, kind = tokens_of(
        position, evict_at, cu_seqlens, spans, shifts, p_b, p_t, p_h, e_b, e_t, e_h, tokens,
        sequences, steps, stream // HEADS, stream % HEADS, block, TOKENS, PACKED,
    )  # fmt: skip
    # tokens of each class in all programs, and in those before this one
    label = tl.arange(0, CLASSES)
    before, total = tl.zeros([CLASSES], tl.int32), tl.zeros([CLASSES], tl.int32)
    for first in range(0, blocks, COUNTS):
        other = first + tl.arange(0, COUNTS)
        there = (stream * blocks + other)[:, None] * CLASSES + label[None, :]
        some = tl.load(counts + there, mask=(other < blocks)[:, None], other=0)
        total += tl.sum(some, 0)
        before += tl.sum(tl.where((other < block)[:, None], some, 0), 0)
    # the second part begins at a whole block
    lasting = tl.sum(tl.where(label == 0, total, 0), 0)
    gap = tl.cdiv(lasting, ALIGN) * ALIGN - lasting
    starts = tl.cumsum(total, 0) - total + tl.where(label == 0, 0, gap)
    # the slot of a token: how many of its class come before it
    hot = one_hot(kind)
    rank = tl.cumsum(hot, 0) - 1 + (starts + before)[None, :]
    slot = tl.sum(hot * rank, 1)
    row, rows = stream * slots, (tl.num_programs(0) // programs).to(tl.int64) * slots
    inside, seen = kind < CLASSES, kind < LAST
    token = block * TOKENS + tl.arange(0, TOKENS)
    tl.store(times + row + slot, token, mask=inside)
    tl.store(times + rows + row + slot, tl.where(seen, begins, NOT_YET).to(tl.int32), mask=inside)
    tl.store(times + 2 * rows + row + slot, tl.where(seen, ends, -1).to(tl.int32), mask=inside)
    # padding: this program looks after the slots block * TOKENS ...
    rest = (token >= lasting) & (token < lasting + gap) | (token >= tokens + gap)
    rest = rest & (token < slots)
    tl.store(times + row + token, tl.full([TOKENS], -1, tl.int32), mask=rest)
    tl.store(times + rows + row + token, tl.full([TOKENS], NOT_YET, tl.int32), mask=rest)
    tl.store(times + 2 * rows + row + token, tl.full([TOKENS], -1, tl.int32), mask=rest)
    if block == 0:
        there = classes + stream * 2 * CLASSES + label
        tl.store(there, starts)
        tl.store(there + CLASSES, total)
