"""Gated delta rule: the recurrent memory of a HAM layer, and the residual it failed to predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_floating,
    check_range,
    check_scale,
    check_tensor,
    without_heads,
    wrong,
)
from hamblocks_ops.declare import Hints, op_with_choice
from hamblocks_ops.dispatch import Implementation, interpreted
from hamblocks_ops.gated_delta_rule import opaque, reference, refused
from hamblocks_ops.gated_delta_rule.call import (
    DeltaRuleCall,
    DeltaRuleOutput,
    DeltaRuleRaw,
    finish,
)
from hamblocks_ops.precision import wide
from hamblocks_ops.surprise import METRICS

__all__ = ["DeltaRuleOutput", "gated_delta_rule"]


def _run_fla(call: DeltaRuleCall) -> DeltaRuleRaw:
    from hamblocks_ops.gated_delta_rule.fla import run

    return run(call)


def _run_steps(call: DeltaRuleCall) -> DeltaRuleRaw:
    from hamblocks_ops.gated_delta_rule.triton import run

    return run(call)


def _example(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    beta = torch.zeros(x.shape[:3], device=x.device)
    return (x, x, x), {"beta": beta, "metric": "cosine", "output_residual": False}


@op_with_choice(
    Implementation(
        "triton", _run_steps, refused.refused_steps, refused.passed_over_steps, opaque=True
    ),
    Implementation("fla", _run_fla, refused.refused, passed_over=interpreted, opaque=True),
    Implementation("chunked", opaque.run),
    Implementation("reference", reference.run),
    finish=finish,
    hints=Hints(
        differentiable=True,
        scores_residual=True,
        by_token=("q", "k", "v", "beta", "g"),
        streams=("initial_state", "final_state"),
        by_sequence=("final_state",),
    ),
    example=_example,
)
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

    Per sequence and head, with state \(S\) of shape `[K, V]` (Gated Delta Networks, arXiv
    2412.06464):

    \[
    \tilde S_t = e^{g_t} S_{t-1}, \quad r_t = v_t - \tilde S_t^\top k_t, \quad
    S_t = \tilde S_t + \beta_t k_t r_t^\top, \quad o_t = \text{scale} \cdot S_t^\top q_t
    \]

    Args:
        q: `[B, T, H, K]`, any floating dtype.
        k: `[B, T, H, K]`, same dtype; of unit length, or the recurrence may be unstable.
        v: `[B, T, HV, V]`, same dtype; HV is a multiple of H (value head h reads q and k of head h
            // (HV // H)).
        beta: `[B, T, HV]`, floating, in [0, 2]: the write strength.
        g: `[B, T, HV]`, floating, <= 0, natural log of the decay; -inf forgets everything. None: no
            decay.
        scale: factor of the read; None: K ** -0.5.
        initial_state: `[N, HV, K, V]`; None: zeros.
        cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one batch row (B = 1).
        output_residual: whether to return the residual. It is differentiable.
        metric: "cosine", "relative_l2" or "l2": return `surprise(residual, v, metric=metric)` as
            score, detached.
        impl: "triton" (one kernel, token by token, for few tokens without a gradient), "fla"
            (flash-linear-attention's kernels on a GPU, in chunks; bfloat16 and float16), "chunked"
            (torch, any device), "reference" (token by token), or "auto".

    States, g, beta and scores are computed in float32, in float64 for float64 inputs, also under
    autocast.

    Returns:
        out `[B, T, HV, V]`, final_state `[N, HV, K, V]`, and residual and score or None (see
        `DeltaRuleOutput`).

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    dtype = wide(q)
    key_dim = q.shape[3]
    if g is None:
        g = torch.zeros_like(beta, dtype=dtype)
    if initial_state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = q.new_zeros(sequences, v.shape[2], key_dim, v.shape[3], dtype=dtype)
    call = DeltaRuleCall(
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
    return gated_delta_rule.request(call, impl)


@gated_delta_rule.check
def _check_gated_delta_rule(
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
) -> None:
    check_tensor("q", q, "[B, T, H, K]", [None] * 4)
    batch, tokens, heads, key_dim = q.shape
    check_floating("q", q)
    check_tensor("k", k, "[B, T, H, K]", [batch, tokens, heads, key_dim], like=q)
    check_floating("k", k, like=q)
    check_tensor("v", v, "[B, T, HV, V]", [batch, tokens, None, None], like=q)
    check_floating("v", v, like=q)
    for name, value in (("q", q), ("v", v)):
        if 0 in value.shape[2:]:
            raise without_heads(name, value)
    value_heads, value_dim = v.shape[2:]
    if value_heads % heads != 0:
        raise wrong("v", f"heads a multiple of the {heads} heads of q", f"{value_heads} heads")
    check_tensor("beta", beta, "[B, T, HV]", [batch, tokens, value_heads], like=q)
    check_floating("beta", beta)
    check_range("beta", beta, 0, 2)
    if g is not None:
        check_tensor("g", g, "[B, T, HV]", [batch, tokens, value_heads], like=q)
        check_floating("g", g)
        check_range("g", g, float("-inf"), 0)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens, q)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        sizes = [sequences, value_heads, key_dim, value_dim]
        check_tensor("initial_state", initial_state, "[N, HV, K, V]", sizes, like=q)
        check_floating("initial_state", initial_state)
    if scale is not None:
        check_scale(scale)
    if metric is not None and metric not in METRICS:
        raise wrong("metric", "one of " + ", ".join(METRICS), metric)
