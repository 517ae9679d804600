"""Checks of gates: `gate(x, trace) -> GateOutput(score, logit_bias)`."""

from __future__ import annotations

from typing import Any

import torch

from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import common, edges_of, first
from hamblocks.testing.inputs.parts import PartInputs
from hamblocks.testing.subjects import GateSubject
from hamblocks_ops.surprise import METRICS


def _names_a_known_metric(part: Any, _case: PartInputs, _options: Options) -> None:
    """An attribute `metric` is one that the memory can compute, or None."""
    metric = getattr(part, "metric", None)
    assert metric is None or metric in METRICS, (
        f"metric: {metric!r}, expected one of {', '.join(METRICS)} or None"
    )


def _bias_can_be_learned(part: Any, case: PartInputs, _options: Options) -> None:
    """A logit bias carries gradient to the weights of the gate: selection itself has none."""
    subject = GateSubject(part, case)
    results, _ = subject.run(subject.inputs)
    bias = results["logit_bias"]
    weights = [x for x in subject.part.parameters() if x.requires_grad]
    assert bias.requires_grad, (
        "logit_bias: carries no gradient, so that the weights of the gate never learn"
    )
    gradients = torch.autograd.grad(bias.sum(), weights, allow_unused=True)
    assert any(x is not None and bool(x.any()) for x in gradients), (
        "logit_bias: its gradient reaches no weight"
    )


def _no_bias_to_learn(part: Any, options: Options) -> str | None:
    if not isinstance(part, torch.nn.Module):
        return "it has no weights"
    subject = GateSubject(part, first(options))
    if "logit_bias" not in subject.run(subject.inputs)[0]:
        return "it gives no logit bias"
    return None if any(x.requires_grad for x in subject.part.parameters()) else "it has no weights"


CHECKS = [
    *common(GateSubject),
    Check("check_gate_names_a_known_metric", "gate", _names_a_known_metric, edges=edges_of({})),
    Check(
        "check_gate_bias_can_be_learned",
        "gate",
        _bias_can_be_learned,
        edges=edges_of({}),
        applies=_no_bias_to_learn,
    ),
]
