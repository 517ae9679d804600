"""Checks of gates: `gate(x, trace) -> GateOutput(score, logit_bias)`."""

from __future__ import annotations

from typing import Any

import torch

from hamblocks.protocols import GateOutput
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import common, edges_of, first
from hamblocks.testing.inputs.parts import PartInputs
from hamblocks.testing.subjects import GateSubject
from hamblocks_ops.arguments import describe
from hamblocks_ops.surprise import METRICS


def _names_a_known_metric(part: Any, _case: PartInputs, _options: Options) -> None:
    """The attribute `metric`, where there is one, is a metric that the memory computes, or None."""
    metric = getattr(part, "metric", None)
    assert metric is None or metric in METRICS, (
        f"metric: {metric!r}, expected one of {', '.join(METRICS)} or None"
    )


def _can_be_called(part: Any, case: PartInputs, _options: Options) -> None:
    """Called as a layer calls it, the gate returns a GateOutput."""
    subject = GateSubject(part, case)
    output = subject.part(subject.inputs["x"], subject.trace(subject.inputs))
    assert isinstance(output, GateOutput), (
        f"output: expected GateOutput(score, logit_bias=None), got {describe(output)}"
    )


def _bias_can_be_learned(part: Any, case: PartInputs, _options: Options) -> None:
    """The weights of a gate get gradients from its logit bias: selection itself has no gradient."""
    assert_learned(GateSubject(part, case), "logit_bias")


def assert_learned(subject: GateSubject, name: str) -> None:
    """Asserts that the weights of a part get a gradient from its result `name`."""
    weights = {key: x for key, x in subject.part.named_parameters() if x.requires_grad}
    result = subject.run(subject.inputs)[0].get(name)
    never = f"so that its weights ({', '.join(weights)}) never learn: decisions have no gradient"
    assert result is not None, f"{name}: the part returns none, {never}"
    assert result.requires_grad, f"{name}: carries no gradient, {never}"
    gradients = torch.autograd.grad(result.sum(), list(weights.values()), allow_unused=True)
    reached = any(x is not None and bool(x.any()) for x in gradients)
    assert reached, f"{name}: its gradient reaches no weight, {never}"


def no_weights(part: Any, kind: type[GateSubject], options: Options) -> str | None:
    """The reason why a check of learning does not apply to a part of some kind, or None."""
    if not isinstance(part, torch.nn.Module):
        return "it has no weights"
    weights = kind(part, first(options)).part.parameters()
    return None if any(x.requires_grad for x in weights) else "it has no weights"


def _no_weights(part: Any, options: Options) -> str | None:
    return no_weights(part, GateSubject, options)


CHECKS = [
    *common(GateSubject),
    Check("check_gate_names_a_known_metric", "gate", _names_a_known_metric, edges=edges_of({})),
    Check("check_gate_can_be_called", "gate", _can_be_called, edges=edges_of({})),
    Check(
        "check_gate_bias_can_be_learned",
        "gate",
        _bias_can_be_learned,
        edges=edges_of({}),
        applies=_no_weights,
    ),
]
