"""What fla does not give of a chunk, in Triton: residual and score, and the gradient of beta without dividing.

A residual is what was written, v_new, over beta. Its gradient reaches v_new divided by beta, and taken together with
the gradient that reaches beta through the same quotient is a difference of large numbers, since a residual does not
depend on its own beta. So the gradient of beta is computed on its own: with D_ij = exp2(g_i - g_j) out of running sums
g of the decay in base 2, and the gradients dr of all later residuals, whatever they come from,

    dbeta_i = residual_i . (local_i + exp2(g_last - g_i) dh^T k_i - sum_{j>i} D_ji (k_j . k_i) dr_j)

where `local` is what reaches v_new through the output of its own chunk, and dh what reaches the state behind it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.tiles.rows import launch, surprise_of

CHUNK = 64


@triton.jit
def residual_kernel(
    v_new, beta, v, residual, score, rows,
    METRIC: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr,
    MOST: tl.constexpr, LEAST: tl.constexpr, HALF: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Residuals (WRITES) and scores (METRIC) of a block of rows.

    Where v_new differs from beta * v by no more than its rounding (HALF, half a step between numbers), nothing was
    predicted: the residual is the value itself, and the score that of no prediction.
    """
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    place, inside = (
        row[:, None] * DIM + column[None, :],
        (row < rows)[:, None] & (column < DIM)[None, :],
    )
    strength = tl.maximum(tl.load(beta + row, mask=row < rows, other=1.0), LEAST)
    value = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
    error = tl.load(v_new + place, mask=inside, other=0.0).to(tl.float32) / strength[:, None]
    beyond = tl.max(tl.abs(value - error) - HALF * tl.abs(value), 1)
    error = tl.where((beyond <= 0)[:, None], value, error)
    if WRITES:
        tl.store(residual + place, error.to(residual.dtype.element_ty), mask=inside)
    if METRIC is not None:
        found = surprise_of(error, value, value - error, METRIC, DIM, TINY, MOST)
        tl.store(score + row, found, mask=row < rows)


@triton.jit
def beta_grad_kernel(
    k, dh, g, beta, v_new, local, dr, dbeta, cu_seqlens, chunk_indices, tokens,
    HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of beta for a chunk."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = row // VALUE_HEADS, row % VALUE_HEADS
    key_head = head // (VALUE_HEADS // HEADS)
    own = (batch * tl.num_programs(0) + chunk) * VALUE_HEADS + head
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
    to_last = tl.exp2(tl.where(inside, last - decay, 0.0))
    place = ((start + token) * HEADS + key_head)[:, None] * K
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
    total = tl.zeros([CHUNK], tl.float32)
    for block in tl.static_range(0, (V + BV - 1) // BV):
        column = block * BV + tl.arange(0, BV)
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
        here, mask = number[:, None] * V + column[None, :], inside[:, None] & (column < V)[None, :]
        grads = tl.load(dr + here, mask=mask, other=0.0)
        wanted = (
            tl.load(local + here, mask=mask, other=0.0).to(tl.float32) + carried * to_last[:, None]
        )
        wanted -= tl.dot(pairs.to(grads.dtype), grads)
        total += tl.sum(tl.load(v_new + here, mask=mask, other=0.0).to(tl.float32) * wanted, 1)
    strength = tl.maximum(tl.load(beta + number, mask=inside, other=1.0), LEAST)
    tl.store(dbeta + number, total / strength, mask=inside)


def read(
    v_new: Tensor,
    beta: Tensor,
    v: Tensor,
    least: float,
    residual: Tensor,
    score: Tensor,
    metric: str | None,
) -> None:
    """Fills residual `[B, T, HV, V]` unless it is empty, and with a metric score `[B, T, HV]`; all contiguous."""
    constants = launch(v.shape[3], metric, torch.float32)
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
    """The gradient of beta: `[B, T, HV]`, float32. dh `[B, chunks, HV, K, V]`: of the state after every chunk."""
    dbeta = torch.empty_like(g)
    key_dim, value_dim = k.shape[3], v_new.shape[3]
    tiles = {
        name: min(64, max(16, triton.next_power_of_2(x)))
        for name, x in (("BK", key_dim), ("BV", value_dim))
    }
    beta_grad_kernel[(dh.shape[1], g.shape[0] * g.shape[2])](
        k, dh, g, beta, v_new, local, dr, dbeta, *(packed or (None, None)), k.shape[1], HEADS=k.shape[2],
        VALUE_HEADS=g.shape[2], K=key_dim, V=value_dim, CHUNK=CHUNK, **tiles, LEAST=least, PACKED=packed is not None,
    )  # fmt: skip
    return dbeta
