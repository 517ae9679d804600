"""The backward kernels: one writes the gradient of q, the other those of k, v and the bias.

Both compute the weights again from the log-sum-exp. Each program owns what it writes and adds it up
in one order, so there are no atomics and the same call gives the same bits. Both walk the lists and
plans that the forward pass made.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.keys import (
    bias_of_keys,
    tile_of_keys,
    tile_of_queries,
)
from hamblocks_ops.selected_attention.triton.plan import FIELDS, KEY_FIELDS
from hamblocks_ops.tiles.attention import LOG2E, products, some_see, visible


@triton.jit
def sums_of(lse, place, inside):
    """The log-sum-exp of queries in base 2.

    +inf for a query that saw nothing, which makes all its weights exp2(-inf) = 0.
    """
    sums = tl.load(lse + place, mask=inside, other=float("inf"))
    return tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)


@triton.jit
def queries_grad_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, asked, plan, wanted, exact, lse, delta,
    dq, q_b, q_t, q_h, scale, factor, queries, slots, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and delta = wanted . out for `keys_grad_kernel`.

    The grid is that of the forward kernel. wanted (the gradient of out), exact (out in float32) and
    dq are contiguous.
    """
    own, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    block_m, batch_head = blocks - 1 - own % blocks, (own // blocks).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    stream = batch * KV_HEADS + head // (HEADS // KV_HEADS)
    query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
    # tensors like out: the first query of the head, and the way to the next query
    first, step = (batch * queries * HEADS + head) * DIM, HEADS * DIM
    asking = tile_of_queries(wanted + first, block_m, queries, step, DIM, WIDTH, BLOCK_M)
    read = tile_of_queries(exact + first, block_m, queries, step, DIM, WIDTH, BLOCK_M)
    place = (batch * queries + query) * HEADS + head
    # the gradient of a softmax is weight * (wanted . v - wanted . out): the last product is the
    # same for every key. Out in float32, because the difference loses what rounding of out has
    # taken away.
    pull = tl.sum(asking.to(tl.float32) * read, 1)
    tl.store(delta + place, pull, mask=query < queries)
    sums = sums_of(lse, place, query < queries)
    tile = tile_of_queries(q + batch * q_b + head * q_h, block_m, queries, q_t, DIM, WIDTH, BLOCK_M)
    here = plan + (stream * blocks + block_m) * FIELDS
    grad = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # phase 1: blocks that every query sees whole, without a mask
    for block in range(tl.load(here), tl.load(here + 1)):
        k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        less = sums[:, None]
        if HAS_BIAS:
            less = less - bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)[None, :]
        weight = tl.exp2(products(tile, k) * factor - less)
        change = weight * (products(asking, v) - pull[:, None])
        grad = tl.dot(change.to(k.dtype), k, grad, input_precision="ieee")
    # phase 2: ranges of blocks that are seen in part
    for part in range(tl.load(here + 2)):
        for block in tl.range(
            tl.load(here + 4 + 2 * part), tl.load(here + 5 + 2 * part), num_stages=1
        ):
            slot = stream * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
            begins, ends = tl.load(position_list + slot), tl.load(evict_list + slot)
            k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            # a key that no query of the block sees may hold NaN, and 0 * NaN is NaN
            k = tl.where(some_see(asks, begins, ends)[:, None], k, 0.0)
            v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
            less = sums[:, None]
            if HAS_BIAS:
                bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
                less = less - bias[None, :]
            weight = tl.exp2(products(tile, k) * factor - less)
            change = weight * (products(asking, v) - pull[:, None])
            change = tl.where(visible(asks, begins, ends), change, 0.0)
            grad = tl.dot(change.to(k.dtype), k, grad, input_precision="ieee")
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
    dk, dv, dbias, q_b, q_t, q_h, scale, factor, queries, tokens, slots,
    HEADS: tl.constexpr,    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of listed keys, over all queries and the heads of its group.

    The grid is [blocks of a list * R]. The plan names the blocks of queries (see
    `plan.KEY_FIELDS`). Results are written where the keys came from: every token has a slot, and
    those that no query sees get zeros.

    Tiles are transposed, [BLOCK_N keys, BLOCK_M queries]: weights and their gradients are then the
    left operand of the products that add up dv and dk, which tensor cores take from registers.
    """
    own, blocks = tl.program_id(0), slots // BLOCK_N
    # the blocks that the most queries see are the first of every list; starting with those of all
    # lists, the last programs to run are short ones
    streams = tl.num_programs(0) // blocks
    block, stream = own // streams, (own % streams).to(tl.int64)
    batch, kv_head = stream // KV_HEADS, stream % KV_HEADS
    slot = stream * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = plan + (stream * blocks + block) * KEY_FIELDS
    begin, full_begin = tl.load(here), tl.load(here + 1)
    full_end, end = tl.load(here + 2), tl.load(here + 3)
    k_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    v_grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    bias_grad = tl.zeros([BLOCK_N], tl.float32)
    if end > begin:
        begins, ends = tl.load(position_list + slot), tl.load(evict_list + slot)
        k = tile_of_keys(k_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        v = tile_of_keys(v_list, stream, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, stream, block, slots, BLOCK_N, HAS_BIAS)
        for member in range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + member
            of_head, step = q + batch * q_b + head * q_h, HEADS * DIM
            wanted_of_head = wanted + (batch * queries * HEADS + head) * DIM
            for block_m in range(begin, end):
                query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
                place = (batch * queries + query) * HEADS + head
                tile = tile_of_queries(of_head, block_m, queries, q_t, DIM, WIDTH, BLOCK_M)
                asking = tile_of_queries(
                    wanted_of_head, block_m, queries, step, DIM, WIDTH, BLOCK_M
                )
                less = sums_of(lse, place, query < queries)[None, :]
                if HAS_BIAS:
                    less = less - bias[:, None]
                pull = tl.load(delta + place, mask=query < queries, other=0.0)
                weight = tl.exp2(products(k, tile) * factor - less)
                change = weight * (products(v, asking) - pull[None, :])
                # queries at the ends of the range may not see every key
                if (block_m < full_begin) | (block_m >= full_end):
                    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
                    seen = (begins[:, None] <= asks[None, :]) & (asks[None, :] < ends[:, None])
                    weight, change = tl.where(seen, weight, 0.0), tl.where(seen, change, 0.0)
                v_grad = tl.dot(weight.to(v.dtype), asking, v_grad, input_precision="ieee")
                k_grad = tl.dot(change.to(k.dtype), tile, k_grad, input_precision="ieee")
                if HAS_BIAS:
                    bias_grad += tl.sum(change, 1)
    token, dim = tl.load(index + slot).to(tl.int64), tl.arange(0, WIDTH)
    inside = (token >= 0)[:, None] & (dim < DIM)[None, :]
    there = (batch * tokens + token) * KV_HEADS + kv_head
    tl.store(
        dk + there[:, None] * DIM + dim[None, :],
        (k_grad * scale).to(dk.dtype.element_ty),
        mask=inside,
    )
    tl.store(dv + there[:, None] * DIM + dim[None, :], v_grad.to(dv.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        tl.store(dbias + there, bias_grad.to(dbias.dtype.element_ty), mask=token >= 0)
