"""Attention over the stored keys in Triton, forward and backward, at the cost of what is stored.

Stored keys are copied side by side (see `lists`); a block of queries then visits blocks of keys that it sees whole,
which need no mask, and a few that it sees in part. Every program owns what it writes and adds it up in one order, so
the same call gives the same bits. Out is kept in float32 for the backward pass: the gradient of a softmax is a
difference that its rounding would spoil.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.dispatch import launches
from hamblocks_ops.packing import NEVER
from hamblocks_ops.selected_attention import lists
from hamblocks_ops.tiles.attention import LOG2E, logits, softmax_grad, softmax_step, visible

NOT_YET = tl.constexpr(NEVER)


class Config(NamedTuple):
    """Sizes of a launch: queries and keys of a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


EIGHT = {
    64: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 64, 8, 2)),
    128: (Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
}
NINE = {
    64: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    128: (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
}
TEN = {
    64: NINE[64],
    128: (Config(64, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
}
"""Launches of forward, gradient of q, gradients of k and v, by padded head size: what the compiler makes of them spills
nothing up to 128 and next to nothing at 256 (docs: Kernels). No GPU has timed them yet."""
LOADED = {
    (8, 64): {2: Config(64, 32, 8, 2)},
    (8, 128): {2: Config(64, 64, 8, 1)},
    (10, 64): {0: Config(128, 32, 8, 3), 2: Config(64, 64, 8, 1)},
    (10, 128): {2: Config(64, 64, 8, 1)},
}
"""Launches, by chip and padded head size, that a bias or grouped queries would make spill: what takes their place."""
EXACT = (Config(32, 32, 4, 1),) * 3
"""Of float32, whose products are no tensor core's."""


def configs(
    width: int, dtype: torch.dtype, major: int, *, loaded: bool = False
) -> tuple[Config, Config, Config]:
    """Launches of the three kernels for a padded head size, the dtype of q and a major compute capability.

    `loaded`: with a bias or grouped queries.
    """
    if dtype == torch.float32:
        return EXACT
    chip, width = 10 if major >= 10 else 9 if major == 9 else 8, max(width, 64)
    table = {8: EIGHT, 9: NINE, 10: TEN}[chip][width]
    instead = LOADED.get((chip, width), {}) if loaded else {}
    first, second, third = (instead.get(place, one) for place, one in enumerate(table))
    return first, second, third


def _configs(q: Tensor, k: Tensor, logit_bias: Tensor | None) -> tuple[Config, Config, Config]:
    major = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 9
    return configs(
        _width(q.shape[3]),
        q.dtype,
        major,
        loaded=logit_bias is not None or q.shape[2] != k.shape[2],
    )


@triton.jit
def copy_kernel(
    k, v, bias, position, evict_at, index,
    k_list, v_list, bias_list, position_list, evict_list,
    least_position, most_position, least_evict_at, most_evict_at,
    k_b, k_t, k_h, v_b, v_t, v_h, tokens, slots,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Copies a block of one list, and finds its extremes. bias, position and evict_at are [B, Tk, Hkv]."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    slot = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index + row * slots + slot).to(tl.int64)
    filled = token >= 0
    place = (batch * tokens + token) * HEADS + head
    begins = tl.load(position + place, mask=filled, other=NOT_YET)
    ends = tl.load(evict_at + place, mask=filled, other=-1)
    tl.store(position_list + row * slots + slot, begins)
    tl.store(evict_list + row * slots + slot, ends)
    own = row * tl.num_programs(0) + block
    tl.store(least_position + own, tl.min(begins, 0))
    tl.store(most_position + own, tl.max(begins, 0))
    tl.store(least_evict_at + own, tl.min(tl.where(filled, ends, NOT_YET), 0))
    tl.store(most_evict_at + own, tl.max(ends, 0))
    if tl.max(token, 0) >= 0:
        if HAS_BIAS:
            tl.store(
                bias_list + row * slots + slot,
                tl.load(bias + place, mask=filled, other=0.0).to(tl.float32),
            )
        dim = tl.arange(0, WIDTH)
        inside = filled[:, None] & (dim < DIM)[None, :]
        here = (row * slots + slot)[:, None] * DIM + dim[None, :]
        whole = tl.broadcast_to((dim < DIM)[None, :], (BLOCK, WIDTH))
        k_here = k + batch * k_b + token[:, None] * k_t + head * k_h + dim[None, :]
        v_here = v + batch * v_b + token[:, None] * v_t + head * v_h + dim[None, :]
        tl.store(k_list + here, tl.load(k_here, mask=inside, other=0.0), mask=whole)
        tl.store(v_list + here, tl.load(v_here, mask=inside, other=0.0), mask=whole)


@triton.jit
def tile_of_keys(
    x, row, block, slots, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of a list [BLOCK, WIDTH], zeros beyond the head size."""
    dim = tl.arange(0, WIDTH)
    # one wide address for all, narrow ones within the tile: fewer registers
    here = (
        x
        + (row * slots + block * BLOCK) * DIM
        + (tl.arange(0, BLOCK)[:, None] * DIM + dim[None, :])
    )
    if WIDTH == DIM:
        return tl.load(here)
    return tl.load(here, mask=tl.broadcast_to((dim < DIM)[None, :], (BLOCK, WIDTH)), other=0.0)


@triton.jit
def tile_of_queries(
    x, batch, head, block, queries, stride_b, stride_t, stride_h, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of q or of something like it [BLOCK, WIDTH], zeros beyond the last query and the head size."""
    row, dim, start = tl.arange(0, BLOCK), tl.arange(0, WIDTH), block * BLOCK
    here = x + batch * stride_b + head * stride_h + start.to(tl.int64) * stride_t
    here += row[:, None] * stride_t + dim[None, :]
    return tl.load(here, mask=(start + row < queries)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def bias_of_keys(bias_list, row, block, slots, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The bias of a block of keys [BLOCK]."""
    if HAS_BIAS:
        return tl.load(bias_list + row * slots + block * BLOCK + tl.arange(0, BLOCK))
    return tl.zeros([BLOCK], tl.float32)


@triton.jit
def in_part(index, begin, full_begin, full_end, end, other_begin):
    """The blocks that are seen in part, counted through: those around what is seen whole, then the second part's."""
    before, after = full_begin - begin, end - full_end
    block = tl.where(index < before, begin + index, full_end + index - before)
    return tl.where(index < before + after, block, other_begin + index - before - after)


@triton.jit
def forward_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, least_position, most_evict_at, asked, low, high, plan,
    out, exact, lse, q_b, q_t, q_h, scale, queries, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Out, log-sum-exp, and out unrounded where the backward pass will want it (KEEP), of a block of queries."""
    blocks = tl.num_programs(0)
    block_m, batch_head = (
        blocks - 1 - tl.program_id(0),
        tl.program_id(1).to(tl.int64),
    )  # the longest first
    batch, head = batch_head // HEADS, batch_head % HEADS
    row = batch * KV_HEADS + head // (HEADS // KV_HEADS)
    query = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = tl.load(asked + batch * queries + query, mask=query < queries, other=-1)
    tile = tile_of_queries(q, batch, head, block_m, queries, q_b, q_t, q_h, DIM, WIDTH, BLOCK_M)
    here = plan + (row * blocks + block_m) * 6
    begin, full_begin, full_end = tl.load(here), tl.load(here + 1), tl.load(here + 2)
    end, other_begin, other_end = tl.load(here + 3), tl.load(here + 4), tl.load(here + 5)
    first, last = tl.load(low + batch * blocks + block_m), tl.load(high + batch * blocks + block_m)
    have = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for block in range(full_begin, full_end):
        k = tile_of_keys(k_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, row, block, slots, BLOCK_N, HAS_BIAS)
        v = tile_of_keys(v_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        have, top, total = softmax_step(logits(tile, k, bias, scale), v, have, top, total)
    extremes = row * (slots // BLOCK_N)
    for index in range(full_begin - begin + end - full_end + other_end - other_begin):
        block = in_part(index, begin, full_begin, full_end, end, other_begin)
        alive = (tl.load(least_position + extremes + block) <= last) & (
            tl.load(most_evict_at + extremes + block) > first
        )
        if alive:
            slot = row * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
            seen = visible(asks, tl.load(position_list + slot), tl.load(evict_list + slot))
            k = tile_of_keys(k_list, row, block, slots, DIM, WIDTH, BLOCK_N)
            bias = bias_of_keys(bias_list, row, block, slots, BLOCK_N, HAS_BIAS)
            logit = tl.where(seen, logits(tile, k, bias, scale), float("-inf"))
            v = tile_of_keys(v_list, row, block, slots, DIM, WIDTH, BLOCK_N)
            v = tl.where(
                (tl.max(seen.to(tl.int32), 0) > 0)[:, None], v, 0.0
            )  # what nobody sees may be NaN
            have, top, total = softmax_step(logit, v, have, top, total)
    have = have / tl.where(total == 0, 1.0, total)[:, None]
    dim = tl.arange(0, WIDTH)
    place = (batch * queries + query) * HEADS + head
    inside = (query < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(out + place[:, None] * DIM + dim[None, :], have.to(out.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(exact + place[:, None] * DIM + dim[None, :], have, mask=inside)
    # exp2(top) is finite in every row that saw something
    sums = tl.where(
        total == 0, float("-inf"), (top + tl.log2(tl.where(total == 0, 1.0, total))) / LOG2E
    )
    tl.store(lse + place, sums, mask=query < queries)


@triton.jit
def queries_grad_kernel(
    q, k_list, v_list, bias_list, position_list, evict_list, least_position, most_evict_at, asked, low, high, plan,
    wanted, exact, lse, delta, dq, q_b, q_t, q_h, scale, queries, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and delta = wanted . out for the other kernel. wanted, exact and dq are contiguous."""
    blocks = tl.num_programs(0)
    block_m, batch_head = blocks - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    row = batch * KV_HEADS + head // (HEADS // KV_HEADS)
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
    pull = tl.sum(asking.to(tl.float32) * read, 1)
    tl.store(delta + place, pull, mask=query < queries)
    sums = tl.load(lse + place, mask=query < queries, other=float("inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    here = plan + (row * blocks + block_m) * 6
    begin, full_begin, full_end = tl.load(here), tl.load(here + 1), tl.load(here + 2)
    end, other_begin, other_end = tl.load(here + 3), tl.load(here + 4), tl.load(here + 5)
    first, last = tl.load(low + batch * blocks + block_m), tl.load(high + batch * blocks + block_m)
    grad = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for block in range(full_begin, full_end):
        k = tile_of_keys(k_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, row, block, slots, BLOCK_N, HAS_BIAS)
        v = tile_of_keys(v_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        _, change = softmax_grad(logits(tile, k, bias, scale), sums, asking, v, pull)
        grad = tl.dot(change.to(k.dtype), k, grad, input_precision="ieee")
    extremes = row * (slots // BLOCK_N)
    for index in range(full_begin - begin + end - full_end + other_end - other_begin):
        block = in_part(index, begin, full_begin, full_end, end, other_begin)
        alive = (tl.load(least_position + extremes + block) <= last) & (
            tl.load(most_evict_at + extremes + block) > first
        )
        if alive:
            slot = row * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
            seen = visible(asks, tl.load(position_list + slot), tl.load(evict_list + slot))
            k = tile_of_keys(k_list, row, block, slots, DIM, WIDTH, BLOCK_N)
            k = tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], k, 0.0)
            bias = bias_of_keys(bias_list, row, block, slots, BLOCK_N, HAS_BIAS)
            v = tile_of_keys(v_list, row, block, slots, DIM, WIDTH, BLOCK_N)
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
    q, k_list, v_list, bias_list, position_list, evict_list, index, asked, plan, wanted, lse, delta, dk, dv, dbias,
    q_b, q_t, q_h, scale, queries, tokens, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of stored keys, added up over queries and the heads of their group."""
    blocks = tl.num_programs(0)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv_head = row // KV_HEADS, row % KV_HEADS
    slot = row * slots + block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = plan + (row * blocks + block) * 4
    begin, full_begin, full_end, end = (
        tl.load(here),
        tl.load(here + 1),
        tl.load(here + 2),
        tl.load(here + 3),
    )
    if end > begin:
        token = tl.load(index + slot).to(tl.int64)
        begins, ends = tl.load(position_list + slot), tl.load(evict_list + slot)
        k = tile_of_keys(k_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        v = tile_of_keys(v_list, row, block, slots, DIM, WIDTH, BLOCK_N)
        bias = bias_of_keys(bias_list, row, block, slots, BLOCK_N, HAS_BIAS)
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


class _Keys:
    """The stored keys of a call, side by side."""

    def __init__(
        self, k: Tensor, v: Tensor, bias: Tensor | None, time: lists.Times, block: int
    ) -> None:
        self.index, self.first = lists.list_keys(time, block)
        rows, self.slots = self.index.shape
        count, (tokens, heads, dim) = self.slots // block, k.shape[1:]
        self.position, self.evict_at = (torch.empty_like(self.index) for _ in range(2))
        self.extremes = lists.Blocks(*(self.index.new_empty(rows, count) for _ in range(4)))
        self.k, self.v = (x.new_empty(rows, self.slots, dim) for x in (k, v))
        self.has_bias = bias is not None
        self.bias = (
            self.index if bias is None else k.new_empty(rows, self.slots, dtype=torch.float32)
        )
        k, v = (_rows(x) for x in (k, v))
        copy_kernel[(count, rows)](
            k, v, self.bias if bias is None else bias.contiguous(), time.position.contiguous(),
            time.evict_at.contiguous(), self.index, self.k, self.v, self.bias, self.position, self.evict_at,
            *self.extremes, *k.stride()[:3], *v.stride()[:3], tokens, self.slots,
            HEADS=heads, DIM=dim, WIDTH=_width(dim), BLOCK=block, HAS_BIAS=self.has_bias,
        )  # fmt: skip

    def parts(self) -> tuple[Tensor, ...]:
        """As the kernels take them."""
        return self.k, self.v, self.bias, self.position, self.evict_at


def _rows(x: Tensor) -> Tensor:
    """With the last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _width(dim: int) -> int:
    """The head size that a tile has: a power of two that tensor cores take."""
    return max(16, int(triton.next_power_of_2(dim)))


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    return {
        "HEADS": q.shape[2],
        "KV_HEADS": k.shape[2],
        "DIM": q.shape[3],
        "WIDTH": _width(q.shape[3]),
    }


def _tile(config: Config) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, config, strict=True))


@torch.library.custom_op("hamblocks::selected_attention_triton", mutates_args=())
@launches
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference`; returns out in the dtype of q, lse, and out in float32 (empty unless `keep`)."""
    out, lse, exact = _empty(q, keep)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf")), exact.zero_()
    config = _configs(q, k, logit_bias)[0]
    time = lists.times(query_position, key_position, evict_at, cu_seqlens)
    keys = _Keys(k, v, logit_bias, time, config.keys)
    low, high = lists.query_blocks(time.asked, config.queries)
    plan = lists.plan_queries(keys.extremes, keys.first, low, high)
    q = _rows(q)
    forward_kernel[(plan.shape[1], q.shape[0] * q.shape[2])](
        q, *keys.parts(), keys.extremes.least_position, keys.extremes.most_evict_at, time.asked.contiguous(), low, high,
        plan, out, exact, lse, *q.stride()[:3], scale, q.shape[1], keys.slots,
        **_shape(q, k), **_tile(config), HAS_BIAS=keys.has_bias, KEEP=keep,
    )  # fmt: skip
    return out, lse, exact


@attend.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, rest[-1])


def _empty(q: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    exact = q.new_empty(q.shape if keep else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), exact


@torch.library.custom_op("hamblocks::selected_attention_triton_backward", mutates_args=())
@launches
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    exact: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and logit_bias (empty without one) from the gradient of out."""
    dq, dk, dv, dbias = _empty_grads(q, k, v, logit_bias)
    for x in (dk, dv, dbias):  # what is not stored has none
        x.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk, dv, dbias
    _, of_queries, of_keys = _configs(q, k, logit_bias)
    time = lists.times(query_position, key_position, evict_at, cu_seqlens)
    keys = _Keys(k, v, logit_bias, time, of_queries.keys)
    q, grad, asked = _rows(q), grad.contiguous(), time.asked.contiguous()
    low, high = lists.query_blocks(asked, of_queries.queries)
    plan = lists.plan_queries(keys.extremes, keys.first, low, high)
    delta = torch.empty_like(lse)
    queries_grad_kernel[(plan.shape[1], q.shape[0] * q.shape[2])](
        q, *keys.parts(), keys.extremes.least_position, keys.extremes.most_evict_at, asked, low, high, plan,
        grad, exact, lse, delta, dq, *q.stride()[:3], scale, q.shape[1], keys.slots,
        **_shape(q, k), **_tile(of_queries), HAS_BIAS=keys.has_bias,
    )  # fmt: skip
    if of_keys.keys != of_queries.keys:
        keys = _Keys(k, v, logit_bias, time, of_keys.keys)
    plan = lists.plan_keys(keys.extremes, *lists.query_blocks(asked, of_keys.queries))
    keys_grad_kernel[(plan.shape[1], plan.shape[0])](
        q, *keys.parts(), keys.index, asked, plan, grad, lse, delta, dk, dv, dbias,
        *q.stride()[:3], scale, q.shape[1], k.shape[1], keys.slots,
        **_shape(q, k), **_tile(of_keys), HAS_BIAS=keys.has_bias,
    )  # fmt: skip
    return dq, dk, dv, dbias


@attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(q, k, v, logit_bias)


def _empty_grads(
    q: Tensor, k: Tensor, v: Tensor, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = q.new_empty(0) if logit_bias is None else logit_bias.new_empty(logit_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, scale, _keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(
    ctx: Any, grad: Tensor, _lse: Tensor, _exact: Tensor
) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, dbias if dbias.numel() else None, None, None, None, None, None


attend.register_autograd(_autograd_backward, setup_context=_setup_context)
