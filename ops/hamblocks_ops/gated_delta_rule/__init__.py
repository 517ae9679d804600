"""Gated delta rule with its residual: the recurrent memory of a HAM layer, and what it failed to predict."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_floating,
    check_range,
    check_tensor,
    wrong,
)
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    always,
    explain_table,
    interpreted,
    pick,
)
from hamblocks_ops.gated_delta_rule import refused
from hamblocks_ops.precision import wide
from hamblocks_ops.surprise import METRICS, surprise


class DeltaRuleOutput(NamedTuple):
    """Result of `gated_delta_rule`.

    Attributes:
        out: `[B, T, HV, V]`, dtype of v.
        final_state: `[N, HV, K, V]`, float32 (float64 for float64 inputs); N is B, or the number of packed sequences.
        residual: `[B, T, HV, V]`, dtype of v; None unless asked for.
        score: `[B, T, HV]`, float32 (float64), detached; None unless a metric was named.
    """

    out: Tensor
    final_state: Tensor
    residual: Tensor | None
    score: Tensor | None


class DeltaRuleCall(NamedTuple):
    """One checked call: what an implementation is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor
    scale: float
    initial_state: Tensor
    cu_seqlens: Tensor | None
    output_residual: bool
    metric: str | None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_residual: bool = True,
    metric: str | None = None,
    impl: str = "auto",
) -> DeltaRuleOutput:
    r"""Runs the gated delta rule over every token and returns the residual beside the output.

    Per sequence and head, with state \(S\) of shape `[K, V]` (Gated Delta Networks, arXiv 2412.06464):

    \[
    \tilde S_t = e^{g_t} S_{t-1}, \quad r_t = v_t - \tilde S_t^\top k_t, \quad
    S_t = \tilde S_t + \beta_t k_t r_t^\top, \quad o_t = \text{scale} \cdot S_t^\top q_t
    \]

    Args:
        q: `[B, T, H, K]`, any floating dtype. Keys are expected to be of unit length for a stable recurrence.
        k: `[B, T, H, K]`, same dtype.
        v: `[B, T, HV, V]`, same dtype; HV is a multiple of H (value head h reads q and k of head h // (HV // H)).
        beta: `[B, T, HV]`, floating, in [0, 2]: the write strength.
        g: `[B, T, HV]`, floating, <= 0, natural log of the decay; -inf forgets everything. None: no decay.
        scale: factor of the read; None: K ** -0.5.
        initial_state: `[N, HV, K, V]`; None: zeros.
        cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one row (B = 1).
        output_residual: whether to return the residual. It is differentiable.
        metric: "cosine", "relative_l2" or "l2": return `surprise(residual, v, metric=metric)` as score, detached.
        impl: "fla" (flash-linear-attention's kernels on a GPU; bfloat16 and float16, float32 for few tokens without a
            gradient), "chunked" (torch, any device), "reference" (token by token), or "auto".

    States, g, beta and scores are computed in float32, in float64 for float64 inputs, whatever autocast says.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    call = _checked(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_residual, metric)
    run = pick("gated_delta_rule", TABLE, impl, call)
    with torch.autocast(device_type=q.device.type, enabled=False):
        result: DeltaRuleOutput = run(call)
    return result


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_residual: bool = True,
    metric: str | None = None,
) -> Explanation:
    """Every implementation of `gated_delta_rule` with "yes", or the reason why it cannot run this call."""
    return explain_table(
        TABLE, _checked(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_residual, metric)
    )


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_residual: bool,
    metric: str | None,
) -> DeltaRuleCall:
    check_tensor("q", q, "[B, T, H, K]", [None] * 4)
    batch, tokens, heads, key_dim = q.shape
    check_floating("q", q)
    check_tensor("k", k, "[B, T, H, K]", [batch, tokens, heads, key_dim], like=q)
    check_floating("k", k, like=q)
    check_tensor("v", v, "[B, T, HV, V]", [batch, tokens, None, None], like=q)
    check_floating("v", v, like=q)
    value_heads, value_dim = v.shape[2:]
    if heads == 0 or value_heads % heads != 0:
        raise wrong("v", f"heads a multiple of the {heads} heads of q", f"{value_heads} heads")
    check_tensor("beta", beta, "[B, T, HV]", [batch, tokens, value_heads], like=q)
    check_floating("beta", beta)
    check_range("beta", beta, 0, 2)
    dtype = wide(q)
    if g is None:
        g = torch.zeros_like(beta, dtype=dtype)
    check_tensor("g", g, "[B, T, HV]", [batch, tokens, value_heads], like=q)
    check_floating("g", g)
    check_range("g", g, float("-inf"), 0)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens, q)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = q.new_zeros(sequences, value_heads, key_dim, value_dim, dtype=dtype)
    check_tensor(
        "initial_state",
        initial_state,
        "[N, HV, K, V]",
        [sequences, value_heads, key_dim, value_dim],
        like=q,
    )
    check_floating("initial_state", initial_state)
    if metric is not None and metric not in METRICS:
        raise wrong("metric", "one of " + ", ".join(METRICS), metric)
    return DeltaRuleCall(
        q=q,
        k=k,
        v=v,
        beta=beta.to(dtype),
        g=g.to(dtype),
        scale=key_dim**-0.5 if scale is None else float(scale),
        initial_state=initial_state.to(dtype),
        cu_seqlens=cu_seqlens,
        output_residual=output_residual,
        metric=metric,
    )


def _finish(
    call: DeltaRuleCall, out: Tensor, residual: Tensor, final_state: Tensor
) -> DeltaRuleOutput:
    """What the torch implementations share: the score from the unrounded residual, then the caller's dtype."""
    score = None
    if call.metric is not None:
        score = surprise(residual.detach(), call.v.detach().to(residual.dtype), metric=call.metric)
    return DeltaRuleOutput(
        out=out.to(call.v.dtype),
        final_state=final_state,
        residual=residual.to(call.v.dtype) if call.output_residual else None,
        score=score,
    )


def _run_reference(call: DeltaRuleCall) -> DeltaRuleOutput:
    from hamblocks_ops.gated_delta_rule.reference import reference

    return _finish(call, *reference(**_tensors(call)))


def _run_chunked(call: DeltaRuleCall) -> DeltaRuleOutput:
    from hamblocks_ops.gated_delta_rule.chunked import chunked

    return _finish(call, *chunked(**_tensors(call)))


def _run_fla(call: DeltaRuleCall) -> DeltaRuleOutput:
    from hamblocks_ops.gated_delta_rule.fla import chunks, recurrent

    given = *call[:5], call.initial_state, call.cu_seqlens, call.scale
    if refused.recurs(call):
        return _finish(call, *recurrent(*given))
    out, residual, state, score, _, _ = chunks(*given, call.output_residual, call.metric)
    return DeltaRuleOutput(
        out,
        state,
        residual if call.output_residual else None,
        None if call.metric is None else score,
    )


def _tensors(call: DeltaRuleCall) -> dict[str, Any]:
    """As the torch implementations take them: q and k for every head of v."""
    tensors = {name: getattr(call, name) for name in call._fields[:8]}
    group = call.v.shape[2] // call.q.shape[2]
    if group > 1:
        tensors |= {name: tensors[name].repeat_interleave(group, 2) for name in ("q", "k")}
    return tensors


TABLE = (
    Implementation("fla", refused.refused, lambda: _run_fla, interpreted),
    Implementation("chunked", always, lambda: _run_chunked),
    Implementation("reference", always, lambda: _run_reference),
)
