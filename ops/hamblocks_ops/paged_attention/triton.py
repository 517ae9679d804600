"""Attention to pages in Triton: keys and values are read where they lie, once for every stream.

The slots of a stream, page after page, are cut into shares, and a program (`share_kernel`) walks
one share in tiles of BLOCK_N slots. Tiles do not care where a page ends. Slots that no query sees
are not loaded. `merge_kernel` then merges the shares of a query by their log-sum-exp, in one order,
so the same call gives the same bits.

How many shares there are follows from shapes alone. Nothing waits for the device, as a CUDA graph
needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.dispatch import launches
from hamblocks_ops.packing import NEVER
from hamblocks_ops.paged_attention.layout import PagedCall
from hamblocks_ops.tiles.attention import LOG2E, new_peak, products, softmax_step, visible

MIN_SHARE_TILES = 4
"""Fewest tiles of a share: with fewer, merging costs more than it saves."""
MAX_WAVES = 2
"""Most programs for each multiprocessor: more shares than that occupy nothing new."""
NOT_YET = tl.constexpr(NEVER)


class Config(NamedTuple):
    """Sizes of a launch: most queries of a tile, slots of a tile, warps, pipeline stages."""

    queries: int
    slots: int
    warps: int
    stages: int


def config(width: int, dtype: torch.dtype) -> Config:
    """The launch for a padded head size and a dtype."""
    if dtype == torch.float32:
        return Config(16, 32, 4, 1)
    return Config(64, 64, 4, 2) if width <= 128 else Config(32, 32, 4, 2)


@triton.jit
def share_kernel(
    q, k, v, position, evict_at, bias, table, asked, out, lse, scale, k_p, k_s, k_w, v_p, v_s, v_w,
    begin, pages, columns, queries, per_share, first_share, STREAMS: tl.constexpr,
    TOGETHER: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Out and log-sum-exp (in base 2) of one share of the slots of a stream, in one slab.

    The grid is [streams * TOGETHER, shares, blocks of queries]: the first dimension of a grid is
    the only one that may have more than 65,535 programs. STREAMS streams belong to one sequence; a
    page holds TOGETHER key/value heads, and GROUP query heads read each.
    """
    which, share, block_m = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    stream, head = which // TOGETHER, which % TOGETHER
    sequence = stream // STREAMS
    # phase 1: the tile of queries. The queries of a group go one behind the other, token after
    # token, so that one tile of keys serves them all.
    member = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    token, inside_m = member // GROUP, member < queries * GROUP
    heads = STREAMS * TOGETHER * GROUP
    own = (
        (sequence * queries + token) * heads
        + ((stream % STREAMS) * TOGETHER + head) * GROUP
        + member % GROUP
    )
    asks = tl.load(asked + sequence * queries + token, mask=inside_m, other=NOT_YET)
    dim = tl.arange(0, WIDTH)
    mask_m = inside_m[:, None] & (dim < DIM)[None, :]
    tile = tl.load(q + own[:, None] * DIM + dim[None, :], mask=mask_m, other=0.0)
    have = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # phase 2: the tiles of the share
    end = tl.minimum((share + 1) * per_share, tl.cdiv(columns * PAGE, BLOCK_N))
    for block in range(share * per_share, end):
        slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
        page = (
            tl.load(
                table + stream * columns + slot // PAGE, mask=slot < columns * PAGE, other=-1
            ).to(tl.int64)
            - begin
        )
        # `begin` is the number of the slab's first page: pages of other slabs fall outside
        listed = (page >= 0) & (page < pages) & (slot < columns * PAGE)
        place = page * PAGE + slot % PAGE
        begins = tl.load(position + place, mask=listed, other=NOT_YET)
        ends = tl.load(evict_at + place, mask=listed, other=-1)
        shift = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + place, mask=listed, other=float("-inf")).to(tl.float32)
            # a bias of -inf hides a slot, and keys behind it may hold NaN
            listed = listed & (shift > float("-inf"))
            shift = tl.where(listed, shift, 0.0)
        seen = visible(asks, begins, ends) & listed[None, :]
        some = tl.max(seen.to(tl.int32), 0) > 0
        # a tile without a visible slot costs its positions alone
        if tl.max(some.to(tl.int32), 0) > 0:
            mask = some[:, None] & (dim < DIM)[None, :]
            at = slot % PAGE
            keys = tl.load(
                k + (page * k_p + at * k_s + head * k_w)[:, None] + dim[None, :],
                mask=mask,
                other=0.0,
            )
            values = tl.load(
                v + (page * v_p + at * v_s + head * v_w)[:, None] + dim[None, :],
                mask=mask,
                other=0.0,
            )
            logit = products(tile, keys) * (scale * LOG2E)
            if HAS_BIAS:
                logit += shift[None, :] * LOG2E
            logit = tl.where(seen, logit, float("-inf"))
            have, top, total = softmax_step(logit, values, have, top, total, 1.0)
    # phase 3: normalise and write; out is [shares, N, T, Hq, D] over the shares of all slabs
    empty = total == 0
    there = (first_share + share) * tl.num_programs(0).to(tl.int64) // (
        STREAMS * TOGETHER
    ) * queries * heads + own
    tl.store(
        out + there[:, None] * DIM + dim[None, :],
        have / tl.where(empty, 1.0, total)[:, None],
        mask=mask_m,
    )
    tl.store(
        lse + there,
        tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total))),
        mask=inside_m,
    )


@triton.jit
def merge_kernel(
    parts, sums, out, lse, queries, shares,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the shares of a block of queries.

    Args:
        parts: float32 `[shares, queries, DIM]`.
        sums: float32 `[shares, queries]`, in base 2.
        out: `[queries, DIM]`.
        lse: float32 `[queries]`, natural.
        queries: N * T * Hq.
        shares: how many there are.
    """
    query, dim = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = query < queries
    mask = inside[:, None] & (dim < DIM)[None, :]
    have = tl.zeros([BLOCK, WIDTH], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(shares):
        here = share * queries + query
        own = tl.load(sums + here, mask=inside, other=float("-inf"))
        higher, base = new_peak(top, own)
        fade, weight = tl.exp2(top - base), tl.exp2(own - base)
        part = tl.load(parts + here[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        have = have * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = higher
    empty = total == 0
    have = have / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + query[:, None] * DIM + dim[None, :], have.to(out.dtype.element_ty), mask=mask)
    sums_of = (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E
    tl.store(lse + query, tl.where(empty, float("-inf"), sums_of), mask=inside)


@torch.library.custom_op("hamblocks::paged_attention_triton", mutates_args=())
@launches
def attend(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    position: Sequence[Tensor],
    evict_at: Sequence[Tensor],
    logit_bias: Sequence[Tensor],
    block_table: Tensor,
    query_position: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out `[N, T, Hq, D]` in the dtype of q and lse `[N, T, Hq]` in float32.

    The fields of all slabs, bias or none.
    """
    out, lse = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )
    sequences, queries, heads, dim = q.shape
    streams, columns = block_table.shape[1:]
    # slabs that have something to read
    lying = [i for i, x in enumerate(k) if x.numel() and block_table.numel() and q.numel()]
    if not lying:
        return out.zero_(), lse.fill_(float("-inf"))
    together = k[0].shape[2]
    group = heads // (streams * together)
    width = max(16, int(triton.next_power_of_2(dim)))
    sizes = config(width, q.dtype)
    block_m = min(sizes.queries, max(16, int(triton.next_power_of_2(queries * group))))
    blocks, every = triton.cdiv(queries * group, block_m), sequences * streams * together
    shares = [
        _shares(columns * k[i].shape[1], sizes.slots, blocks * every, q.device) for i in lying
    ]
    count = sum(number for number, _ in shares)
    parts = q.new_empty(count, *q.shape, dtype=torch.float32)
    sums = q.new_empty(count, *q.shape[:3], dtype=torch.float32)
    q, table, asked = q.contiguous(), block_table.contiguous(), query_position.contiguous()
    first, begins = 0, _begins(k)
    for i, (number, per_share) in zip(lying, shares, strict=True):
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (k[i], v[i]))
        # any pointer will do where there is no bias
        bias = logit_bias[i].contiguous() if logit_bias else parts
        share_kernel[(every, number, blocks)](
            q, keys, values, position[i].contiguous(), evict_at[i].contiguous(), bias, table, asked,
            parts, sums, scale, *keys.stride()[:3], *values.stride()[:3], begins[i], len(keys),
            columns, queries, per_share, first, STREAMS=streams, TOGETHER=together, GROUP=group,
            PAGE=keys.shape[1], DIM=dim, WIDTH=width, BLOCK_M=block_m, BLOCK_N=sizes.slots,
            HAS_BIAS=bool(logit_bias), num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip
        first += number
    block = max(1, 1024 // width)
    merge_kernel[(triton.cdiv(lse.numel(), block),)](
        parts, sums, out, lse, lse.numel(), count, DIM=dim, WIDTH=width, BLOCK=block
    )
    return out, lse


@attend.register_fake
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _begins(k: Sequence[Tensor]) -> list[int]:
    """The number of the first page of every slab."""
    found = [0]
    for x in k:
        found.append(found[-1] + x.shape[0])
    return found


def _shares(slots: int, tile: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many shares a stream is cut into, and the tiles of each; by shapes alone."""
    wanted = MAX_WAVES * (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 8
    )
    tiles = triton.cdiv(slots, tile)
    number = max(1, min(triton.cdiv(wanted, programs), tiles // MIN_SHARE_TILES))
    per_share = triton.cdiv(tiles, number)
    return triton.cdiv(tiles, per_share), per_share


def run(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns out `[N, T, Hq, D]` in the dtype of q, and lse `[N, T, Hq]`."""
    k, v, position, evict_at, bias = (
        [getattr(slab, name) for slab in call.slabs] for name in call.slabs[0]._fields
    )
    biases = [x for x in bias if x is not None]
    result: tuple[Tensor, Tensor] = attend(
        call.q, k, v, position, evict_at, biases, call.block_table, call.query_position, call.scale
    )
    return result
