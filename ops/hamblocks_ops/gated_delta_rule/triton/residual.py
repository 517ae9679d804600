"""What fla does not compute for a chunk: residual and score, and the gradient of beta.

fla's kernels give v_new = beta * residual. `residual_kernel` divides by beta and scores the result.
In the backward pass the gradient of a residual reaches v_new divided by beta. It also reaches beta
through the same quotient, and the two contributions to the gradient of beta cancel almost, because
a residual does not depend on its own beta: their difference is mostly rounding. `beta_grad_kernel`
computes the gradient of beta directly instead. With g the running sum of the decay within the chunk
in base 2, D_ij = exp2(g_i - g_j), and dr the gradients of the residuals from all sources,

    dbeta_i = residual_i . (local_i + exp2(g_last - g_i) dh^T k_i - sum_{j>i} D_ji (k_j . k_i) dr_j)

where `local` is what reaches v_new through the outputs of its own chunk, and dh is the gradient of
the state after the chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.tiles.rows import launch, surprise_of

CHUNK = 64
"""Tokens of a chunk: what fla's kernels take."""


@triton.jit
def residual_kernel(
    v_new, beta, v, residual, score, rows, METRIC: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr,
    LEAST: tl.constexpr, HALF: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Residuals (WRITES) and scores (METRIC) of a block of vectors of `[B * T * HV, V]`.

    Where v_new differs from beta * v by no more than its rounding (HALF, half a step between
    neighbouring numbers), the state predicted nothing: the residual is the value itself, and the
    score that of no prediction. Without this rule the rounding of v_new, divided by beta, would be
    taken for a prediction.
    """
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    place, inside = (
        row[:, None] * DIM + column[None, :],
        (row < rows)[:, None] & (column < DIM)[None, :],
    )
    strength = tl.maximum(tl.load(beta + row, mask=row < rows, other=1.0), LEAST)
    value = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
    error = tl.load(v_new + place, mask=inside, other=0.0).to(tl.float32) / strength[:, None]
    # relative to HALF * |v|: positive if any entry is further from the value than rounding explains
    beyond = tl.max(tl.abs(value - error) - HALF * tl.abs(value), 1)
    error = tl.where((beyond <= 0)[:, None], value, error)
    if WRITES:
        tl.store(residual + place, error.to(residual.dtype.element_ty), mask=inside)
    if METRIC is not None:
        found = surprise_of(error, value, value - error, METRIC, DIM, TINY, MOST)
        tl.store(score + row, found, mask=row < rows)


@triton.jit
def beta_grad_kernel(
    k, dh, g, beta, v_new, local, dr, dbeta, cu_seqlens, chunk_indices, tokens, chunks,
    HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of beta for one chunk of one value head.

    A program owns a chunk; the grid is [B * VALUE_HEADS * chunks]. K and V are walked in tiles of
    BK and BV, which bounds the registers for any head size.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk, stream = program % chunks, program // chunks
    batch, head = stream // VALUE_HEADS, stream % VALUE_HEADS
    # under grouped heads, several value heads read one key head
    key_head = head // (VALUE_HEADS // HEADS)
    # dh is [B, chunks, HV, K, V]; in a packed batch the chunks of all sequences are counted through
    own = (batch * chunks + chunk) * VALUE_HEADS + head
    start = batch * tokens
    if PACKED:
        sequence = tl.load(chunk_indices + chunk * 2).to(tl.int64)
        chunk = tl.load(chunk_indices + chunk * 2 + 1).to(tl.int64)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    number = (start + token) * VALUE_HEADS + head
    decay = tl.load(g + number, mask=inside, other=0.0)
    last = tl.load(g + (start + tl.minimum((chunk + 1) * CHUNK, tokens) - 1) * VALUE_HEADS + head)
    # decay from a token to the end of the chunk; outside the sequence the difference would be
    # garbage
    to_last = tl.exp2(tl.where(inside, last - decay, 0.0))
    place = ((start + token) * HEADS + key_head)[:, None] * K
    # phase 1: (k_j . k_i) D_ji for j > i, rows i, columns j
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in tl.static_range(0, (K + BK - 1) // BK):
        dim = part * BK + tl.arange(0, BK)
        keys = tl.load(
            k + place + dim[None, :], mask=inside[:, None] & (dim < K)[None, :], other=0.0
        )
        pairs = tl.dot(keys, tl.trans(keys), pairs)
    later = (token[:, None] < token[None, :]) & inside[None, :]
    pairs = tl.where(
        later, pairs * tl.exp2(tl.where(later, decay[None, :] - decay[:, None], 0.0)), 0.0
    )
    # phase 2: for each tile of V, the bracket of the formula, multiplied by v_new and summed over V
    total = tl.zeros([CHUNK], tl.float32)
    for block in tl.static_range(0, (V + BV - 1) // BV):
        column = block * BV + tl.arange(0, BV)
        # dh^T k_i: what reaches the token through the state after the chunk
        carried = tl.zeros([CHUNK, BV], tl.float32)
        for part in tl.static_range(0, (K + BK - 1) // BK):
            dim = part * BK + tl.arange(0, BK)
            keys = tl.load(
                k + place + dim[None, :], mask=inside[:, None] & (dim < K)[None, :], other=0.0
            )
            state = dh + own * K * V + dim[:, None] * V + column[None, :]
            carried = tl.dot(
                keys,
                tl.load(state, mask=(dim < K)[:, None] & (column < V)[None, :], other=0.0),
                carried,
            )
        # local_i, then the decayed state's part, then what later residuals take away
        here, mask = number[:, None] * V + column[None, :], inside[:, None] & (column < V)[None, :]
        grads = tl.load(dr + here, mask=mask, other=0.0)
        wanted = (
            tl.load(local + here, mask=mask, other=0.0).to(tl.float32) + carried * to_last[:, None]
        )
        wanted -= tl.dot(pairs.to(grads.dtype), grads)
        total += tl.sum(tl.load(v_new + here, mask=mask, other=0.0).to(tl.float32) * wanted, 1)
    # v_new = beta * residual, so one division at the end turns the sum into residual . (...)
    strength = tl.maximum(tl.load(beta + number, mask=inside, other=1.0), LEAST)
    tl.store(dbeta + number, total / strength, mask=inside)


def residual_and_score(
    v_new: Tensor,
    beta: Tensor,
    v: Tensor,
    least: float,
    residual: Tensor,
    score: Tensor,
    metric: str | None,
) -> None:
    """Writes residual `[B, T, HV, V]` unless it is empty, and with a metric score `[B, T, HV]`.

    `least` takes the place of a smaller beta.
    """
    constants = launch(v.shape[3], metric, torch.float32)
    # a little more than half a step, because the comparison in the kernel is rounded itself
    half = torch.finfo(v.dtype).eps / 2 * 1.001
    residual_kernel[(triton.cdiv(beta.numel(), constants["BLOCK"]),)](
        v_new,
        beta,
        v,
        residual,
        score,
        beta.numel(),
        **constants,
        LEAST=least,
        HALF=half,
        WRITES=residual.numel() > 0,
    )


def beta_grad(
    k: Tensor,
    dh: Tensor,
    g: Tensor,
    beta: Tensor,
    v_new: Tensor,
    local: Tensor,
    dr: Tensor,
    least: float,
    packed: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The gradient of beta `[B, T, HV]`, float32, for calls whose residual has a gradient.

    Args:
        k: `[B, T, H, K]`.
        dh: `[B, chunks, HV, K, V]`, gradient of the state after every chunk.
        g: `[B, T, HV]`, running sums of the decay within each chunk, in base 2.
        beta: `[B, T, HV]`.
        v_new: `[B, T, HV, V]`, beta * residual.
        local: `[B, T, HV, V]`, the gradient that reaches v_new through its own chunk's outputs.
        dr: `[B, T, HV, V]`, the gradient of v_new from all sources.
        least: takes the place of a smaller beta.
        packed: borders and chunk indices of a packed batch.
    """
    dbeta = torch.empty_like(g)
    key_dim, value_dim = k.shape[3], v_new.shape[3]
    tiles = {
        name: min(64, max(16, triton.next_power_of_2(x)))
        for name, x in (("BK", key_dim), ("BV", value_dim))
    }
    beta_grad_kernel[(g.shape[0] * g.shape[2] * dh.shape[1],)](
        k, dh, g, beta, v_new, local, dr, dbeta, *(packed or (None, None)), k.shape[1], dh.shape[1],
        HEADS=k.shape[2], VALUE_HEADS=g.shape[2], K=key_dim, V=value_dim, CHUNK=CHUNK, **tiles,
        LEAST=least, PACKED=packed is not None,
    )  # fmt: skip
    return dbeta
