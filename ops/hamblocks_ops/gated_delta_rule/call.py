"""What an implementation of `gated_delta_rule` is given, and what is made of its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.precision import detached
from hamblocks_ops.surprise import surprise


class DeltaRuleOutput(NamedTuple):
    """Result of `gated_delta_rule`.

    Attributes:
        out: `[B, T, HV, V]`, dtype of v.
        final_state: `[N, HV, K, V]`, float32 (float64 for float64 inputs); N is B, or the number of
            packed sequences.
        residual: `[B, T, HV, V]`, dtype of v; None if `output_residual` is False.
        score: `[B, T, HV]`, float32 (float64), detached; None if `metric` is None.
    """

    out: Tensor
    final_state: Tensor
    residual: Tensor | None
    score: Tensor | None


class DeltaRuleCall(NamedTuple):
    """One call of `gated_delta_rule`.

    Beta, g and initial_state are float32 or float64, and present.
    """

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


class DeltaRuleRaw(NamedTuple):
    """What an implementation returns, unrounded or in the dtype of v; a score if it has one."""

    out: Tensor
    residual: Tensor
    final_state: Tensor
    score: Tensor | None = None


def learns(call: DeltaRuleCall) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(
        x.requires_grad for x in (call.q, call.k, call.v, call.beta, call.g, call.initial_state)
    )


def per_value_head(call: DeltaRuleCall) -> dict[str, Any]:
    """The arguments of the torch implementations: q and k are repeated for every head of v."""
    arguments = {name: getattr(call, name) for name in call._fields[:8]}
    group = call.v.shape[2] // call.q.shape[2]
    if group > 1:
        arguments |= {name: arguments[name].repeat_interleave(group, 2) for name in ("q", "k")}
    return arguments


def finish(call: DeltaRuleCall, raw: DeltaRuleRaw) -> DeltaRuleOutput:
    """The score of the residual before it is rounded, then the caller's dtype."""
    score = raw.score
    if score is None and call.metric is not None:
        residual, v = detached(raw.residual), detached(call.v)
        score = surprise.unchecked(residual, v.to(residual.dtype), metric=call.metric)
    return DeltaRuleOutput(
        out=raw.out.to(call.v.dtype),
        final_state=raw.final_state,
        residual=raw.residual.to(call.v.dtype) if call.output_residual else None,
        score=score,
    )
