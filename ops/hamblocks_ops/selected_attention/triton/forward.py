"""The forward kernel: a block of queries visits the blocks of stored keys that its plan names."""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.keys import (
    bias_of_keys,
    tile_of_keys,
    tile_of_queries,
)
from hamblocks_ops.selected_attention.triton.plan import FIELDS
from hamblocks_ops.tiles.attention import (
    LOG2E,
    TINY,
    products,
    softmax_step,
    some_see,
    visible,
    with_bias,
)


@triton.jit
def forward_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, asked, plan, out, exact, lse, q_b, q_t,
    q_h, factor, queries, slots, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Out and log-sum-exp of a block of queries; with KEEP out in float32 for the backward pass.

    The grid is [B * HEADS * blocks of queries]. out, exact and lse are contiguous; lse is natural,
    all else in base 2, as is factor, the scale of the logits.
    """
    own, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    # late queries see the most keys; starting with them, the last programs to run are short ones
    block_m, batch_head = blocks - 1 - own % blocks, (own // blocks).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    stream = batch * KV_HEADS + head // (HEADS // KV_HEADS)
    query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
    tile = tile_of_queries(q + batch * q_b + head * q_h, block_m, queries, q_t, DIM, WIDTH, BLOCK_M)
    # the factor has to be positive, as the largest product is scaled and not the products; the
    # queries take its sign
    tile = tl.where(factor < 0, -tile, tile)
    scaled = tl.maximum(tl.abs(factor), TINY)
    # with a bias the logits are complete before the step
    applied = 1.0 if HAS_BIAS else scaled
    here = plan + (stream * blocks + block_m) * FIELDS
    have = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # phase 1: blocks that every query sees whole, without a mask
    for block in range(tl.load(here), tl.load(here + 1)):
        k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
        v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        logit = with_bias(products(tile, k), bias, scaled, HAS_BIAS)
        have, top, total = softmax_step(logit, v, have, top, total, applied)
    # phase 2: ranges of blocks that are seen in part
    for part in range(tl.load(here + 2)):
        for block in tl.range(
            tl.load(here + 4 + 2 * part), tl.load(here + 5 + 2 * part), num_stages=1
        ):
            slot = stream * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
            begins, ends = tl.load(position_list + slot), tl.load(evict_list + slot)
            k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
            logit = with_bias(products(tile, k), bias, scaled, HAS_BIAS)
            v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            # a key that no query of the block sees may hold NaN, and 0 * NaN is NaN
            v = tl.where(some_see(asks, begins, ends)[:, None], v, 0.0)
            logit = tl.where(visible(asks, begins, ends), logit, float("-inf"))
            have, top, total = softmax_step(logit, v, have, top, total, applied)
    # phase 3: normalise and write; a query that saw nothing has have = total = 0 and writes 0 and
    # -inf
    have = have / tl.where(total == 0, 1.0, total)[:, None]
    dim = tl.arange(0, WIDTH)
    place = (batch * queries + query) * HEADS + head
    inside = (query < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + dim[None, :], have.to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(exact + place[:, None] * DIM + dim[None, :], have, mask=inside)
    # back to the natural logarithm; top is finite for every query that saw something
    sums = tl.where(
        total == 0, float("-inf"), (top + tl.log2(tl.where(total == 0, 1.0, total))) / LOG2E
    )
    tl.store(lse + place, sums, mask=query < queries)
