"""Lists in Triton: one kernel counts, another counts on from there and writes; each token is read twice, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.dispatch import launches
from hamblocks_ops.packing import NEVER

TOKENS = 256
NO_POSITION = tl.constexpr(NEVER)


@triton.jit
def stored_tile(
    evict_at, position, e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, block, batch, group,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Lifetimes and positions of a block of tokens [TOKENS, HEADS], and which are stored."""
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
    """How many tokens of a block are stored: counts [B, blocks, H]."""
    block, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    _, _, stored, _, head = stored_tile(
        evict_at,
        position,
        e_b,
        e_t,
        e_h,
        p_b,
        p_t,
        p_h,
        tokens,
        heads,
        block,
        batch,
        group,
        TOKENS,
        HEADS,
    )
    own = (batch * tl.num_programs(0) + block) * heads + head
    tl.store(counts + own, tl.sum(stored.to(tl.int32), 0), mask=head < heads)


@triton.jit
def write_kernel(
    evict_at, position, counts, index, positions, lifetimes, totals,
    e_b, e_t, e_h, p_b, p_t, p_h, tokens, heads, blocks, capacity,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes what a block stores behind what those before it store, and fills the same stretch of the lists' ends."""
    block, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    ends, begins, stored, token, head = stored_tile(
        evict_at,
        position,
        e_b,
        e_t,
        e_h,
        p_b,
        p_t,
        p_h,
        tokens,
        heads,
        block,
        batch,
        group,
        TOKENS,
        HEADS,
    )
    before, total = tl.zeros([HEADS], tl.int32), tl.zeros([HEADS], tl.int32)
    for first in range(0, blocks, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        there = (batch * blocks + other)[:, None] * heads + head[None, :]
        some = tl.load(
            counts + there, mask=(other < blocks)[:, None] & (head < heads)[None, :], other=0
        )
        total += tl.sum(some, 0)
        before += tl.sum(tl.where((other < block)[:, None], some, 0), 0)
    rank = before[None, :] + tl.cumsum(stored.to(tl.int32), 0) - 1
    row = (batch * heads + head)[None, :] * capacity
    place, mask = row + rank, stored & (rank < capacity)
    tl.store(
        index + place, tl.broadcast_to(token[:, None], (TOKENS, HEADS)).to(tl.int32), mask=mask
    )
    tl.store(positions + place, begins.to(tl.int32), mask=mask)
    tl.store(lifetimes + place, ends.to(tl.int32), mask=mask)
    slot = block * TOKENS + tl.arange(0, TOKENS)
    rest = (slot[:, None] >= total[None, :]) & (slot < capacity)[:, None] & (head < heads)[None, :]
    place = row + slot[:, None]
    tl.store(index + place, tl.full([TOKENS, HEADS], 0, tl.int32) + tokens, mask=rest)
    tl.store(positions + place, tl.full([TOKENS, HEADS], NO_POSITION, tl.int32), mask=rest)
    tl.store(lifetimes + place, tl.full([TOKENS, HEADS], 0, tl.int32), mask=rest)
    tl.store(totals + batch * heads + head, total, mask=(head < heads) & (block == 0))


@torch.library.custom_op("hamblocks::compact_triton", mutates_args=())
@launches
def lists(
    evict_at: Tensor, position: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[B, T, H]` twice -> index, position, evict_at, int32 `[B, H, capacity]`, and how many are stored `[B, H]`."""
    batch, tokens, heads = evict_at.shape
    found = [evict_at.new_empty(batch, heads, capacity, dtype=torch.int32) for _ in range(3)]
    totals = evict_at.new_zeros(batch, heads, dtype=torch.int32)
    if batch * heads == 0:
        return found[0], found[1], found[2], totals
    blocks = triton.cdiv(tokens, TOKENS)
    counts = evict_at.new_empty(batch, blocks, heads, dtype=torch.int32)
    width = min(16, int(triton.next_power_of_2(heads)))
    sizes = {"TOKENS": TOKENS, "HEADS": width, "num_warps": 8}
    given = *evict_at.stride(), *position.stride(), tokens, heads
    if blocks:
        count_kernel[(blocks, batch, triton.cdiv(heads, width))](
            evict_at, position, counts, *given, **sizes
        )
    grid = max(blocks, triton.cdiv(capacity, TOKENS), 1), batch, triton.cdiv(heads, width)
    write_kernel[grid](
        evict_at, position, counts, *found, totals, *given, blocks, capacity, **sizes, AT_ONCE=64
    )
    return found[0], found[1], found[2], totals


@lists.register_fake
def _(evict_at: Tensor, position: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads = evict_at.shape
    found = [evict_at.new_empty(batch, heads, capacity, dtype=torch.int32) for _ in range(3)]
    return found[0], found[1], found[2], evict_at.new_empty(batch, heads, dtype=torch.int32)
