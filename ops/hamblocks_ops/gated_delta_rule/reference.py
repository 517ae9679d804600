"""The gated delta rule, token by token: the definition that others are compared with.

For every sequence and head, with a state S of shape [K, V]:

    S~_t = exp(g_t) S_{t-1}             decay
    r_t  = v_t - S~_t^T k_t             residual: what the state did not predict, before the write
    S_t  = S~_t + k_t (beta_t r_t)^T    write
    o_t  = scale S_t^T q_t              read

(Yang, Kautz and Hatamizadeh, *Gated Delta Networks*, arXiv 2412.06464.) Exact to rounding in
float64. In lower precision the arithmetic is that of a tensor core: the operands of every product
are rounded to the dtype of the inputs, sums and the state are float32. The error of this arithmetic
is the measure of what other implementations may have.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hamblocks_ops.gated_delta_rule.call import DeltaRuleCall, DeltaRuleRaw, per_value_head


def run(call: DeltaRuleCall) -> DeltaRuleRaw:
    """Runs a call, unrounded."""
    return DeltaRuleRaw(*reference(**per_value_head(call)))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in the op, q and k already with the heads of v.

    Returns out, residual and final state unrounded.
    """
    if cu_seqlens is None:
        return _batch([q, k, v, beta, g], scale, initial_state)
    borders = cu_seqlens.tolist()
    pieces = [
        _batch([x[:, start:stop] for x in (q, k, v, beta, g)], scale, initial_state[n : n + 1])
        for n, (start, stop) in enumerate(itertools.pairwise(borders))
    ]
    if not pieces:
        return v.to(g.dtype), v.to(g.dtype), initial_state
    out, residual, state = zip(*pieces, strict=True)
    return torch.cat(out, 1), torch.cat(residual, 1), torch.cat(state, 0)


def _batch(inputs: list[Tensor], scale: float, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, beta, g = inputs
    wide = state.dtype

    def operand(x: Tensor) -> Tensor:
        return x.to(v.dtype).to(wide)

    q, k, values = q.to(wide), k.to(wide), v.to(wide)
    outs, residuals = [], []
    for t in range(v.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        residual = values[:, t] - torch.einsum("bhkv,bhk->bhv", operand(state), k[:, t])
        write = operand(beta[:, t, :, None] * residual)
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", operand(state), q[:, t]))
        residuals.append(residual)
    if not outs:
        return values, values, state
    return torch.stack(outs, 1), torch.stack(residuals, 1), state
