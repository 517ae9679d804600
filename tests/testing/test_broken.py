"""Every check can fail: each broken part is rejected by the check that is meant for it."""

from __future__ import annotations

from typing import Any

import pytest
from broken import (
    BROKEN,
    Broken,
    attentions,
    combiners,
    controllers,
    gates,
    layers,
    memories,
    ops,
    query_gates,
    selectors,
)

from hamblocks.testing import CHECKS, CheckFailed, OpImplementation, Options, run_checks
from hamblocks.testing.order import NEEDS, STAGES, needs
from hamblocks.testing.suite import BY_NAME, settled

KINDS = (gates, selectors, memories, controllers, attentions, combiners, layers, ops, query_gates)
SOUND: dict[str, list[Any]] = {
    "gate": [gates.Gate(), gates.Router()],
    "selector": [selectors.TopK(), selectors.Threshold()],
    "memory": [memories.Memory(), memories.Waits()],
    "controller": [controllers.Controller()],
    "attention": [attentions.Attention()],
    "combiner": [combiners.Combiner()],
    "query_gate": [query_gates.Asks(gates.Gate()), query_gates.Asks(gates.Router())],
    "layer": [layers.Layer()],  # `test_ours` has every kind of HAM layer
}


def part_of(one: Broken) -> Any:
    return one.factory() if one.like is None else OpImplementation(one.like, one.factory())


def run(check: str, part: Any) -> None:
    options = settled(BY_NAME[check].kind, part, Options())
    BY_NAME[check](part, options=options, profile="ci", shrink=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "one", BROKEN, ids=lambda one: f"{one.check.removeprefix('check_')}-{one.name}"
)
def test_a_broken_part_is_rejected_by_the_check_that_is_meant_for_it(one: Broken) -> None:
    with pytest.raises(CheckFailed) as caught:
        run(one.check, part_of(one))
    message = str(caught.value)
    assert message.startswith(f"{one.check}: ")
    assert f"\n  again: {one.check}(" in message


@pytest.mark.parametrize(
    ("kind", "number"),
    [(kind, number) for kind, parts in SOUND.items() for number in range(len(parts))],
    ids=lambda x: str(x),
)
@pytest.mark.slow
def test_the_part_that_was_broken_is_sound(kind: str, number: int) -> None:
    part = SOUND[kind][number]
    options = settled(kind, part, Options())
    for check in CHECKS[kind]:
        if check.why_not(part, options) is None:
            run(check.name, part)


def test_every_check_rejects_something() -> None:
    assert KINDS
    assert len(BROKEN) >= 40
    assert {one.check for one in BROKEN} <= set(BY_NAME)
    assert set(BY_NAME) - {one.check for one in BROKEN} == set()


def outcomes(kind: str, part: Any, **given: Any) -> dict[str, str]:
    return {result.check: result.outcome for result in run_checks(kind, part, **given)}


@pytest.mark.parametrize(
    ("kind", "part", "failing"),
    [
        ("gate", gates.TakesNoTrace(), "check_gate_can_be_called"),
        ("gate", gates.ReturnsATensor(), "check_gate_can_be_called"),
        ("gate", gates.Misspelt(), "check_gate_names_a_known_metric"),
        ("gate", gates.FlatScore(), "check_gate_has_its_shapes"),
        ("gate", gates.Peeks(), "check_gate_is_causal"),
        ("gate", gates.Dithered(), "check_gate_same_call_same_bits"),
        ("gate", gates.InPlace(), "check_gate_nothing_given_changes"),
        ("gate", gates.TrustsStrides(), "check_gate_strides_do_not_matter"),
        ("gate", gates.CrossesBorders(), "check_gate_packed_is_one_by_one"),
        ("gate", gates.LeaksThroughTheBias(), "check_gate_gradients_are_causal"),
        ("memory", memories.ReturnsNoState(), "check_memory_can_be_called"),
        pytest.param(
            "memory",
            memories.ForgetsItsState(),
            "check_memory_any_split_is_one_pass",
            marks=pytest.mark.slow,
        ),
        ("selector", selectors.LongLifetimes(), "check_selector_has_its_shapes"),
        ("selector", selectors.RandomTies(), "check_selector_same_call_same_bits"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_one_reason_fails_one_check(kind: str, part: Any, failing: str) -> None:
    told = outcomes(kind, part, profile="ci", shrink=False)
    assert [check for check, outcome in told.items() if outcome == "fail"] == [failing]
    assert "not run" in told.values()


def test_the_reason_names_the_check_that_failed() -> None:
    results = {result.check: result for result in run_checks("gate", gates.Peeks(), shrink=False)}
    split = results["check_gate_any_split_is_one_pass"]
    assert (split.outcome, split.reason) == ("not run", "needs check_gate_is_causal, which fails")
    alone = outcomes("gate", gates.Peeks(), only=[split.check], shrink=False)
    assert alone == {split.check: "fail"}


def test_every_check_runs_after_those_that_it_needs() -> None:
    for checks in CHECKS.values():
        seen: set[str] = set()
        for check in checks:
            kind = {one.name for one in checks}
            assert check.name not in needs(check)
            assert kind & set(needs(check)) <= seen
            seen.add(check.name)


def test_every_law_that_others_need_is_that_of_a_check() -> None:
    laws = {check.law for check in BY_NAME.values()}
    needing = {
        law.removeprefix("query_").removeprefix("gate_").removeprefix("combiner_") for law in NEEDS
    }
    needed = {law for some in (*STAGES, *NEEDS.values()) for law in some}
    assert needing | needed <= laws
