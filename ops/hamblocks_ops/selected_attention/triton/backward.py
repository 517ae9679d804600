"""The backward kernels: one writes the gradient of q, the other those of k, v and the bias.

Both compute the weights again from the log-sum-exp. Each program owns what it writes and adds it up
in one order, so there are no atomics and the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.keys import (
    bias_of_keys,
    in_part,
    tile_of_keys,
    tile_of_queries,
)
from hamblocks_ops.tiles.attention import LOG2E, logits, softmax_grad, visible


@triton.jit
def queries_grad_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, least_position, most_evict_at, asked,
    low, high, plan, wanted, exact, lse, delta, dq, q_b, q_t, q_h, scale, queries, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and delta = wanted . out for `keys_grad_kernel`.

    The grid is that of the forward kernel. wanted (the gradient of out), exact (out in float32) and
    dq are contiguous.
    """
    blocks = tl.num_programs(0)
    block_m, batch_head = blocks - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    stream = batch * KV_HEADS + head // (HEADS // KV_HEADS)
    query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
    tile = tile_of_queries(q, batch, head, block_m, queries, q_b, q_t, q_h, DIM, WIDTH, BLOCK_M)
    own_b, own_t = queries.to(tl.int64) * HEADS * DIM, HEADS * DIM
    asking = tile_of_queries(
        wanted, batch, head, block_m, queries, own_b, own_t, DIM, DIM, WIDTH, BLOCK_M
    )
    read = tile_of_queries(
        exact, batch, head, block_m, queries, own_b, own_t, DIM, DIM, WIDTH, BLOCK_M
    )
    place = (batch * queries + query) * HEADS + head
    # the gradient of a softmax is weight * (wanted . v - wanted . out): the last product is the
    # same for every key. Out in float32, because the difference loses what rounding of out has
    # taken away.
    pull = tl.sum(asking.to(tl.float32) * read, 1)
    tl.store(delta + place, pull, mask=query < queries)
    sums = tl.load(lse + place, mask=query < queries, other=float("inf"))
    # a query that saw nothing gets lse = +inf, which makes all its weights exp2(-inf) = 0
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    here = plan + (stream * blocks + block_m) * 6
    begin, full_begin, full_end = tl.load(here), tl.load(here + 1), tl.load(here + 2)
    end, other_begin, other_end = tl.load(here + 3), tl.load(here + 4), tl.load(here + 5)
    first, last = tl.load(low + batch * blocks + block_m), tl.load(high + batch * blocks + block_m)
    grad = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # phase 1: blocks that every query sees whole, without a mask
    for block in range(full_begin, full_end):
        k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
        v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        _, change = softmax_grad(logits(tile, k, bias, scale), sums, asking, v, pull)
        grad = tl.dot(change.to(k.dtype), k, grad, input_precision="ieee")
    # phase 2: blocks that are seen in part
    extremes = stream * (slots // BLOCK_N)
    for index in range(full_begin - begin + end - full_end + other_end - other_begin):
        block = in_part(index, begin, full_begin, full_end, end, other_begin)
        alive = (tl.load(least_position + extremes + block) <= last) & (
            tl.load(most_evict_at + extremes + block) > first
        )
        if alive:
            slot = stream * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
            seen = visible(asks, tl.load(position_list + slot), tl.load(evict_list + slot))
            k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            # a key that no query of the block sees may hold NaN, and 0 * NaN is NaN
            k = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], k, 0.0)
            bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
            v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            logit = tl.where(seen, logits(tile, k, bias, scale), float("-inf"))
            _, change = softmax_grad(logit, sums, asking, v, pull)
            grad = tl.dot(tl.where(seen, change, 0.0).to(k.dtype), k, grad, input_precision="ieee")
    dim = tl.arange(0, WIDTH)
    inside = (query < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(
        dq + place[:, None] * DIM + dim[None, :],
        (grad * scale).to(dq.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def keys_grad_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, index, asked, plan, wanted, lse, delta,
    dk, dv, dbias, q_b, q_t, q_h, scale, queries, tokens, slots, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of stored keys, over all queries and the heads of its group.

    The grid is [blocks of a list, B * Hkv lists]. The plan names the blocks of queries (see
    `lists.plan_keys`). Results are written where the keys came from; keys that are not stored keep
    the zeros that the launch put there.
    """
    blocks = tl.num_programs(0)
    block, stream = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = stream // KV_HEADS, stream % KV_HEADS
    slot = stream * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = plan + (stream * blocks + block) * 4
    begin, full_begin, full_end, end = (
        tl.load(here),
        tl.load(here + 1),
        tl.load(here + 2),
        tl.load(here + 3),
    )
    if end > begin:
        token = tl.load(index + slot).to(tl.int64)
        begins, ends = tl.load(position_list + slot), tl.load(evict_list + slot)
        k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
        k_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        v_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        bias_grad = tl.zeros([BLOCK_N], tl.float32)
        own_b, own_t = queries.to(tl.int64) * HEADS * DIM, HEADS * DIM
        for member in range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + member
            for block_m in range(begin, end):
                query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
                place = (batch * queries + query) * HEADS + head
                tile = tile_of_queries(
                    q, batch, head, block_m, queries, q_b, q_t, q_h, DIM, WIDTH, BLOCK_M
                )
                asking = tile_of_queries(
                    wanted, batch, head, block_m, queries, own_b, own_t, DIM, DIM, WIDTH, BLOCK_M
                )
                pull = tl.load(delta + place, mask=query < queries, other=0.0)
                sums = tl.load(lse + place, mask=query < queries, other=float("inf"))
                sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
                weight, change = softmax_grad(logits(tile, k, bias, scale), sums, asking, v, pull)
                # queries at the ends of the range may not see every key
                if (block_m < full_begin) | (block_m >= full_end):
                    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
                    seen = visible(asks, begins, ends)
                    weight, change = tl.where(seen, weight, 0.0), tl.where(seen, change, 0.0)
                v_grad = tl.dot(
                    tl.trans(weight.to(v.dtype)), asking, v_grad, input_precision="ieee"
                )
                k_grad = tl.dot(tl.trans(change.to(k.dtype)), tile, k_grad, input_precision="ieee")
                if HAS_BIAS:
                    bias_grad += tl.sum(change, 0)
        dim = tl.arange(0, WIDTH)
        inside = (token >= 0)[:, None] & (dim < DIM)[None, :]
        there = (batch * tokens + token) * KV_HEADS + kv_head
        tl.store(
            dk + there[:, None] * DIM + dim[None, :],
            (k_grad * scale).to(dk.dtype.element_ty),
            mask=inside,
        )
        tl.store(
            dv + there[:, None] * DIM + dim[None, :], v_grad.to(dv.dtype.element_ty), mask=inside
        )
        if HAS_BIAS:
            tl.store(dbias + there, bias_grad.to(dbias.dtype.element_ty), mask=token >= 0)
