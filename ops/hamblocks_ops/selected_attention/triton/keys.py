"""Stored keys of a call, copied side by side, and how kernels read tiles of them.

Keys are copied once so that the other kernels read whole blocks of consecutive memory, which no
gather in a kernel comes near. What is copied is the stored keys alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.selected_attention.triton.moments import NOT_YET
from hamblocks_ops.tiles.attention import LOG2E

MIN_DIM = 16
"""Smallest head size of a tile: what a product on tensor cores takes."""


@triton.jit
def copy_kernel(
    k, v, bias, times, k_list, v_list, bias_list, extremes, k_b, k_t, k_h, v_b, v_t, v_h, b_b, b_t,
    b_h, slots, units, streams, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Copies a unit of one list, and finds its extremes (see `plan`).

    The grid is [R * units]. k, v and bias come with their strides, bias is [B, Tk, Hkv]. The lists
    are [R, slots, ...]; that of the bias is float32 in base 2.
    """
    own = tl.program_id(0).to(tl.int64)
    stream, unit = own // units, own % units
    batch, head = stream // HEADS, stream % HEADS
    slot = stream * slots + unit * UNIT + tl.arange(0, UNIT)
    token = tl.load(times + slot).to(tl.int64)
    begins = tl.load(times + streams * slots + slot)
    ends = tl.load(times + 2 * streams * slots + slot)
    # a slot that no query sees has the position NEVER and ends at -1
    stored = begins < NOT_YET
    tl.store(extremes + own, tl.min(begins, 0))
    tl.store(extremes + streams * units + own, tl.max(begins, 0))
    tl.store(extremes + 2 * streams * units + own, tl.min(tl.where(stored, ends, NOT_YET), 0))
    tl.store(extremes + 3 * streams * units + own, tl.max(ends, 0))
    # a unit without a stored key is never read, or read and hidden, so its keys stay uninitialised
    if tl.max(stored.to(tl.int32), 0) > 0:
        if HAS_BIAS:
            there = bias + batch * b_b + token * b_t + head * b_h
            shift = tl.load(there, mask=stored, other=0.0).to(tl.float32)
            tl.store(bias_list + slot, shift * LOG2E)
        dim = tl.arange(0, WIDTH)
        inside = stored[:, None] & (dim < DIM)[None, :]
        here = slot[:, None] * DIM + dim[None, :]
        whole = tl.broadcast_to((dim < DIM)[None, :], (UNIT, WIDTH))
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
    x, block, queries, stride_t, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block [BLOCK, WIDTH] of one head; zeros beyond the last query and DIM.

    x points at the first query of the head in q or in a tensor like it.
    """
    row, dim = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    here = x + row.to(tl.int64)[:, None] * stride_t + dim[None, :]
    return tl.load(here, mask=(row < queries)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def bias_of_keys(bias_list, stream, block, slots, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The bias of a block of keys [BLOCK] in base 2; without one 0, which no kernel adds."""
    if HAS_BIAS:
        return tl.load(bias_list + stream * slots + block * BLOCK + tl.arange(0, BLOCK))
    return tl.zeros([BLOCK], tl.float32)


def dense(x: Tensor) -> Tensor:
    """The same with a contiguous last dimension, which the kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded_dim(dim: int) -> int:
    """The head size of a tile: the next power of two that tensor cores take."""
    return max(MIN_DIM, int(triton.next_power_of_2(dim)))
