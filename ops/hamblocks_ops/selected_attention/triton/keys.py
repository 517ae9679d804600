"""Stored keys of a call, copied side by side, and how kernels read tiles of them.

Keys are copied once so that the other kernels read whole blocks of consecutive memory, which no
gather in a kernel comes near. What is copied is the stored keys alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.packing import NEVER
from hamblocks_ops.selected_attention import lists

NOT_YET = tl.constexpr(NEVER)
MIN_DIM = 16
"""Smallest head size of a tile: what a product on tensor cores takes."""


@triton.jit
def copy_kernel(
    k, v, bias, position, evict_at, index, k_list, v_list, bias_list, position_list, evict_list,
    least_position, most_position, least_evict_at, most_evict_at, k_b, k_t, k_h, v_b, v_t, v_h,
    tokens, slots, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Copies a block of one list, and finds its extremes.

    The grid is [blocks of a list, B * Hkv lists]. k and v come with their strides; bias, position
    and evict_at are contiguous [B, Tk, Hkv]. The lists are [B * Hkv, slots, ...].
    """
    block, stream = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = stream // HEADS, stream % HEADS
    slot = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index + stream * slots + slot).to(tl.int64)
    # padding has the token -1: it begins never and ends before every query
    filled = token >= 0
    place = (batch * tokens + token) * HEADS + head
    begins = tl.load(position + place, mask=filled, other=NOT_YET)
    ends = tl.load(evict_at + place, mask=filled, other=-1)
    tl.store(position_list + stream * slots + slot, begins)
    tl.store(evict_list + stream * slots + slot, ends)
    own = stream * tl.num_programs(0) + block
    tl.store(least_position + own, tl.min(begins, 0))
    tl.store(most_position + own, tl.max(begins, 0))
    tl.store(least_evict_at + own, tl.min(tl.where(filled, ends, NOT_YET), 0))
    tl.store(most_evict_at + own, tl.max(ends, 0))
    # a block of padding alone is never read, so its keys stay uninitialised
    if tl.max(token, 0) >= 0:
        if HAS_BIAS:
            tl.store(
                bias_list + stream * slots + slot,
                tl.load(bias + place, mask=filled, other=0.0).to(tl.float32),
            )
        dim = tl.arange(0, WIDTH)
        inside = filled[:, None] & (dim < DIM)[None, :]
        here = (stream * slots + slot)[:, None] * DIM + dim[None, :]
        whole = tl.broadcast_to((dim < DIM)[None, :], (BLOCK, WIDTH))
        k_here = k + batch * k_b + token[:, None] * k_t + head * k_h + dim[None, :]
        v_here = v + batch * v_b + token[:, None] * v_t + head * v_h + dim[None, :]
        tl.store(k_list + here, tl.load(k_here, mask=inside, other=0.0), mask=whole)
        tl.store(v_list + here, tl.load(v_here, mask=inside, other=0.0), mask=whole)


@triton.jit
def tile_of_keys(
    x, stream, block, slots, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of a list [BLOCK, WIDTH], zeros beyond the head size."""
    dim = tl.arange(0, WIDTH)
    # one int64 address for the tile and int32 offsets within it, which take fewer registers
    here = (
        x
        + (stream * slots + block * BLOCK) * DIM
        + (tl.arange(0, BLOCK)[:, None] * DIM + dim[None, :])
    )
    if WIDTH == DIM:
        return tl.load(here)
    return tl.load(here, mask=tl.broadcast_to((dim < DIM)[None, :], (BLOCK, WIDTH)), other=0.0)


@triton.jit
def tile_of_queries(
    x, batch, head, block, queries, stride_b, stride_t, stride_h, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK, WIDTH] of q or a tensor like it; zeros beyond the last query and DIM."""
    query, dim, start = tl.arange(0, BLOCK), tl.arange(0, WIDTH), block * BLOCK
    here = x + batch * stride_b + head * stride_h + start.to(tl.int64) * stride_t
    here += query[:, None] * stride_t + dim[None, :]
    return tl.load(here, mask=(start + query < queries)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def bias_of_keys(bias_list, stream, block, slots, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The bias of a block of keys [BLOCK]."""
    if HAS_BIAS:
        return tl.load(bias_list + stream * slots + block * BLOCK + tl.arange(0, BLOCK))
    return tl.zeros([BLOCK], tl.float32)


@triton.jit
def in_part(index, begin, full_begin, full_end, end, other_begin):
    """The index-th block that takes a mask.

    Counted through are the blocks before those seen whole, the blocks behind them, then those of
    the second part.
    """
    before, after = full_begin - begin, end - full_end
    block = tl.where(index < before, begin + index, full_end + index - before)
    return tl.where(index < before + after, block, other_begin + index - before - after)


class StoredKeys:
    """The stored keys of a call, side by side.

    Attributes:
        index: int32 `[R, slots]`, the token in a slot, -1 for padding.
        first: int32 `[R]`, the number of blocks of the first part (see `lists`).
        k: `[R, slots, D]`.
        v: `[R, slots, D]`.
        bias: float32 `[R, slots]`, or any tensor without a bias.
        position: int32 `[R, slots]`.
        evict_at: int32 `[R, slots]`.
        extremes: of positions and lifetimes, for every block.
    """

    def __init__(
        self, k: Tensor, v: Tensor, bias: Tensor | None, time: lists.Times, block: int
    ) -> None:
        self.index, self.first = lists.list_keys(time, block)
        streams, self.slots = self.index.shape
        count, (tokens, heads, dim) = self.slots // block, k.shape[1:]
        self.position, self.evict_at = (torch.empty_like(self.index) for _ in range(2))
        self.extremes = lists.Blocks(*(self.index.new_empty(streams, count) for _ in range(4)))
        self.k, self.v = (x.new_empty(streams, self.slots, dim) for x in (k, v))
        self.has_bias = bias is not None
        self.bias = (
            self.index if bias is None else k.new_empty(streams, self.slots, dtype=torch.float32)
        )
        k, v = (dense(x) for x in (k, v))
        copy_kernel[(count, streams)](
            k, v, self.bias if bias is None else bias.contiguous(), time.position.contiguous(),
            time.evict_at.contiguous(), self.index, self.k, self.v, self.bias, self.position,
            self.evict_at, *self.extremes, *k.stride()[:3], *v.stride()[:3], tokens, self.slots,
            HEADS=heads, DIM=dim, WIDTH=padded_dim(dim), BLOCK=block, HAS_BIAS=self.has_bias,
        )  # fmt: skip

    def parts(self) -> tuple[Tensor, ...]:
        """The lists, in the order of the kernels' arguments."""
        return self.k, self.v, self.bias, self.position, self.evict_at


def dense(x: Tensor) -> Tensor:
    """The same with a contiguous last dimension, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded_dim(dim: int) -> int:
    """The head size of a tile: the next power of two that tensor cores take."""
    return max(MIN_DIM, int(triton.next_power_of_2(dim)))
