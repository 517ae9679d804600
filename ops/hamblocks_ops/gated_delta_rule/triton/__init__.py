"""The gated delta rule token by token, in one kernel: what decoding runs.

A program owns a block of columns of the state of one sequence and head, `[K, BV]`, and keeps it in
registers from the first token to the last. It reads the state before it writes to it, so the
residual costs nothing, and where the block holds all columns it scores the residual too. There is
no gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.dispatch import launches
from hamblocks_ops.gated_delta_rule.call import DeltaRuleCall, DeltaRuleRaw
from hamblocks_ops.tiles.rows import surprise_of

TILE_ENTRIES = 128 * 128
"""Most entries of the state that a program holds, K * BV: 64 registers of each of 256 threads."""


@triton.jit
def step_kernel(
    q, k, v, beta, g, state, out, residual, score, final_state, cu_seqlens, scale, tokens,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, HEADS: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, METRIC: tl.constexpr,
    TINY: tl.constexpr, MOST: tl.constexpr, WRITES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Runs all tokens of one sequence and value head, for a block of columns of the state.

    HEADS counts heads of v; GROUP of them read one head of q and k. WRITES: whether to write the
    residual. METRIC: None writes no score, which needs all columns in one block.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BV - 1) // BV
    stream = program // blocks
    sequence, head = stream // HEADS, stream % HEADS
    row, column = tl.arange(0, BK), (program % blocks) * BV + tl.arange(0, BV)
    in_row, in_column = row < K, column < V
    wide = state.dtype.element_ty
    place = stream * K * V + row[:, None] * V + column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    held = tl.load(state + place, mask=inside, other=0.0)
    # in a packed batch there is one batch row, and a sequence begins where the last one ends
    first, batch = 0 * sequence, sequence
    count = tokens + 0 * sequence
    if PACKED:
        first, batch = tl.load(cu_seqlens + sequence).to(tl.int64), 0 * sequence
        count = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first
    for step in range(count):
        token = first + step
        number = (batch * tokens + token) * HEADS + head
        keys, queries = k + batch * k_b + token * k_t, q + batch * q_b + token * q_t
        key = tl.load(keys + head // GROUP * k_h + row, mask=in_row, other=0.0).to(wide)
        query = tl.load(queries + head // GROUP * q_h + row, mask=in_row, other=0.0).to(wide)
        values = v + batch * v_b + token * v_t + head * v_h
        value = tl.load(values + column, mask=in_column, other=0.0).to(wide)
        # decay, then predict: all reads of the old state come before the write
        held *= tl.exp(tl.load(g + number))
        predicted = tl.sum(held * key[:, None], 0)
        error = value - predicted
        held += key[:, None] * (tl.load(beta + number) * error)[None, :]
        read = tl.sum(held * query[:, None], 0) * scale
        tl.store(out + number * V + column, read.to(out.dtype.element_ty), mask=in_column)
        if WRITES:
            kept = error.to(residual.dtype.element_ty)
            tl.store(residual + number * V + column, kept, mask=in_column)
        if METRIC is not None:
            # a tile of one vector
            found = surprise_of(
                error[None, :], value[None, :], predicted[None, :], METRIC, V, TINY, MOST
            )
            tl.store(score + number, tl.sum(found, 0))
    tl.store(final_state + place, held, mask=inside)


def tile(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """BK, BV and the number of warps."""
    rows = int(triton.next_power_of_2(key_dim))
    columns = min(int(triton.next_power_of_2(value_dim)), max(1, TILE_ENTRIES // rows))
    return rows, columns, min(8, max(1, rows * columns // 2048))


@torch.library.custom_op("hamblocks::gated_delta_rule_step", mutates_args=())
@launches
def steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    writes: bool,
    metric: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs all tokens.

    Returns:
        out `[B, T, HV, V]`; residual, empty unless it is written; the final state; score `[B, T,
        HV]`, empty unless the kernel writes it (see `_empty`).
    """
    out, residual, state, score = _empty(v, g, initial_state, k.shape[3], writes, metric)
    if initial_state.numel() == 0:
        return (
            out.zero_(),
            residual.copy_(v) if residual.numel() else residual,
            state,
            score.zero_(),
        )
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    heads, (key_dim, value_dim) = v.shape[2], initial_state.shape[2:]
    rows, columns, warps = tile(key_dim, value_dim)
    finfo = torch.finfo(initial_state.dtype)
    programs = initial_state.shape[0] * heads * triton.cdiv(value_dim, columns)
    step_kernel[(programs,)](
        q, k, v, beta.contiguous(), g.contiguous(), initial_state.contiguous(), out, residual, score,
        state, cu_seqlens, scale, v.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        HEADS=heads, GROUP=heads // q.shape[2], K=key_dim, V=value_dim, BK=rows, BV=columns,
        METRIC=metric if score.numel() else None, TINY=finfo.tiny, MOST=finfo.max,
        WRITES=residual.numel() > 0, PACKED=cu_seqlens is not None, num_warps=warps,
    )  # fmt: skip
    return out, residual, state, score


@steps.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    writes: bool,
    metric: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(v, g, initial_state, k.shape[3], writes, metric)


def _empty(
    v: Tensor, g: Tensor, initial_state: Tensor, key_dim: int, writes: bool, metric: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `steps` returns, uninitialised.

    A score needs all columns of the state in one program. Else the residual is written for it,
    unrounded.
    """
    in_one = tile(key_dim, v.shape[3])[1] >= v.shape[3]
    scores = metric is not None and in_one
    residual = v.new_empty(v.shape if writes else (0,))
    if metric is not None and not in_one:
        residual = g.new_empty(v.shape)
    return (
        v.new_empty(v.shape),
        residual,
        initial_state.new_empty(initial_state.shape),
        g.new_empty(g.shape if scores else (0,)),
    )


def run(call: DeltaRuleCall) -> DeltaRuleRaw:
    """Runs a call."""
    out, residual, state, score = steps(
        *call[:5],
        call.initial_state,
        call.cu_seqlens,
        call.scale,
        call.output_residual,
        call.metric,
    )
    scored = call.metric is not None and score.dim() == 3
    return DeltaRuleRaw(out, residual, state, score if scored else None)
