"""Checks of query gates: `query_gate(x, trace) -> QueryGateOutput(reads, weight, window)`."""

from __future__ import annotations

from typing import Any

from hamblocks import contracts
from hamblocks.protocols import QueryGateOutput
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import common, edges_of
from hamblocks.testing.inputs.parts import PartInputs
from hamblocks.testing.kinds.gates import assert_learned, no_weights
from hamblocks.testing.subjects import QueryGateSubject
from hamblocks_ops.arguments import describe


def _can_be_called(part: Any, case: PartInputs, _options: Options) -> None:
    """Called as a layer calls it, the query gate returns a QueryGateOutput."""
    subject = QueryGateSubject(part, case)
    output = subject.part(subject.inputs["x"], subject.trace(subject.inputs))
    assert isinstance(output, QueryGateOutput), (
        f"output: expected QueryGateOutput(reads, weight=None, window=0), got {describe(output)}"
    )
    try:
        contracts.check_query_gate(output, subject.inputs["x"])
    except ValueError as error:
        raise AssertionError(str(error)) from error


def _weight_can_be_learned(part: Any, case: PartInputs, _options: Options) -> None:
    """The weights of a query gate get gradients from its `weight`: the decision itself has none."""
    assert_learned(QueryGateSubject(part, case), "weight")


def _no_weights(part: Any, options: Options) -> str | None:
    return no_weights(part, QueryGateSubject, options)


CHECKS = [
    *common(QueryGateSubject),
    Check("check_query_gate_can_be_called", "query_gate", _can_be_called, edges=edges_of({})),
    Check(
        "check_query_gate_weight_can_be_learned",
        "query_gate",
        _weight_can_be_learned,
        edges=edges_of({}),
        applies=_no_weights,
    ),
]
