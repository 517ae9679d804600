"""`compact` in Triton, by two kernels that each read every token once.

A program owns TOKENS tokens of HEADS heads of one batch row. `count_kernel` counts the stored
tokens of each block. `write_kernel` sums the counts of the blocks before its own, which gives the
slot of its first stored token, and writes from there. Blocks write disjoint slots in token order,
so the result does not depend on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.compact.call import CompactCall, Compacted, lengths_of
from hamblocks_ops.dispatch import launches
from hamblocks_ops.packing import NEVER

TOKENS = 256
"""Tokens of a block."""
COUNTS = 64
"""Counts that `write_kernel` sums at a time."""
MAX_HEADS = 16
"""Most heads of a block."""
NO_POSITION = tl.constexpr(NEVER)


@triton.jit
def stored_tile(
    evict_at, position, e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, block, batch, group,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Lifetimes and positions [TOKENS, HEADS] of a block, which are stored, its tokens and heads.

    Positions may be expanded or int64, lifetimes of any strides: both come with their strides.
    """
    token, head = (
        block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS),
        group * HEADS + tl.arange(0, HEADS),
    )
    inside = (token < tokens)[:, None] & (head < heads)[None, :]
    ends = tl.load(
        evict_at + batch * e_b + token[:, None] * e_t + head[None, :] * e_h, mask=inside, other=0
    )
    begins = tl.load(
        position + batch * p_b + token[:, None] * p_t + head[None, :] * p_h, mask=inside, other=0
    )
    return (
        ends.to(tl.int64),
        begins.to(tl.int64),
        inside & (ends.to(tl.int64) > begins.to(tl.int64)),
        token,
        head,
    )


@triton.jit
def count_kernel(
    evict_at, position, counts, e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """How many tokens of a block are stored: counts [B, blocks, H].

    The grid is [B * blocks, groups of heads].
    """
    blocks = tl.cdiv(tokens, TOKENS)
    own, group = tl.program_id(0), tl.program_id(1)
    block, batch = own % blocks, (own // blocks).to(tl.int64)
    _, _, stored, _, head = stored_tile(
        evict_at, position, e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, block, batch, group,
        TOKENS, HEADS,
    )  # fmt: skip
    there = (batch * blocks + block) * heads + head
    tl.store(counts + there, tl.sum(stored.to(tl.int32), 0), mask=head < heads)


@triton.jit
def write_kernel(
    evict_at, position, counts, index, positions, lifetimes, totals,
    e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, blocks, programs, capacity,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Writes the stored tokens of a block, and the padding of the slots with the block's numbers.

    The grid is [B * programs, groups of heads]. Programs beyond the last block of tokens write
    padding alone: a list may be longer than T.
    """
    number, group = tl.program_id(0), tl.program_id(1)
    block, batch = number % programs, (number // programs).to(tl.int64)
    ends, begins, stored, token, head = stored_tile(
        evict_at, position, e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, block, batch, group,
        TOKENS, HEADS,
    )  # fmt: skip
    # stored tokens of all blocks, and of those before this one
    before, total = tl.zeros([HEADS], tl.int32), tl.zeros([HEADS], tl.int32)
    for first in range(0, blocks, COUNTS):
        other = first + tl.arange(0, COUNTS)
        there = (batch * blocks + other)[:, None] * heads + head[None, :]
        some = tl.load(
            counts + there, mask=(other < blocks)[:, None] & (head < heads)[None, :], other=0
        )
        total += tl.sum(some, 0)
        before += tl.sum(tl.where((other < block)[:, None], some, 0), 0)
    # the slot of a stored token: how many come before it in its list
    rank = before[None, :] + tl.cumsum(stored.to(tl.int32), 0) - 1
    own = (batch * heads + head)[None, :] * capacity
    place, mask = own + rank, stored & (rank < capacity)
    tl.store(
        index + place, tl.broadcast_to(token[:, None], (TOKENS, HEADS)).to(tl.int32), mask=mask
    )
    tl.store(positions + place, begins.to(tl.int32), mask=mask)
    tl.store(lifetimes + place, ends.to(tl.int32), mask=mask)
    # padding: this program looks after the slots block * TOKENS ..., from the end of the list on
    slot = block * TOKENS + tl.arange(0, TOKENS)
    rest = (slot[:, None] >= total[None, :]) & (slot < capacity)[:, None] & (head < heads)[None, :]
    place = own + slot[:, None]
    tl.store(index + place, tl.full([TOKENS, HEADS], 0, tl.int32) + tokens, mask=rest)
    tl.store(positions + place, tl.full([TOKENS, HEADS], NO_POSITION, tl.int32), mask=rest)
    tl.store(lifetimes + place, tl.full([TOKENS, HEADS], 0, tl.int32), mask=rest)
    tl.store(totals + batch * heads + head, total, mask=(head < heads) & (block == 0))


@torch.library.custom_op("hamblocks::compact_triton", mutates_args=())
@launches
def lists(
    evict_at: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[B, T, H]` twice -> index, position, evict_at, int32 `[B, H, capacity]`; counts `[B, H]`."""
    batch, tokens, heads = evict_at.shape
    found = [evict_at.new_empty(batch, heads, capacity, dtype=torch.int32) for _ in range(3)]
    totals = evict_at.new_zeros(batch, heads, dtype=torch.int32)
    if batch * heads == 0:
        return found[0], found[1], found[2], totals
    blocks = triton.cdiv(tokens, TOKENS)
    counts = evict_at.new_empty(batch, blocks, heads, dtype=torch.int32)
    width = min(MAX_HEADS, int(triton.next_power_of_2(heads)))
    sizes = {"TOKENS": TOKENS, "HEADS": width, "num_warps": 8}
    given = *evict_at.stride(), *position.stride(), tokens, heads
    if blocks:
        count_kernel[(batch * blocks, triton.cdiv(heads, width))](
            evict_at, position, counts, *given, **sizes
        )
    programs = max(blocks, triton.cdiv(capacity, TOKENS), 1)
    write_kernel[(batch * programs, triton.cdiv(heads, width))](
        evict_at, position, counts, *found, totals, *given, blocks, programs, capacity, **sizes,
        COUNTS=COUNTS,
    )  # fmt: skip
    return found[0], found[1], found[2], totals


@lists.register_fake
def _(evict_at: Tensor, position: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads = evict_at.shape
    found = [evict_at.new_empty(batch, heads, capacity, dtype=torch.int32) for _ in range(3)]
    return found[0], found[1], found[2], evict_at.new_empty(batch, heads, dtype=torch.int32)


def run(call: CompactCall) -> Compacted:
    """Lists what a call stores."""
    index, position, evict_at, counts = lists(call.evict_at, call.position, call.capacity)
    # the kernels count batch rows; of a packed batch the sequences are counted apart
    lengths = counts if call.sequence is None else lengths_of(call)
    return Compacted(index, position, evict_at, lengths)
