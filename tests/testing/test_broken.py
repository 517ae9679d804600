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
    selectors,
)

from hamblocks.testing import CHECKS, CheckFailed, OpImplementation, Options
from hamblocks.testing.suite import BY_NAME, settled

KINDS = (gates, selectors, memories, controllers, attentions, combiners, layers, ops)
SOUND: dict[str, list[Any]] = {
    "gate": [gates.Gate(), gates.Router()],
    "selector": [selectors.TopK(), selectors.Threshold()],
    "memory": [memories.Memory()],
    "controller": [controllers.Controller()],
    "attention": [attentions.Attention()],
    "combiner": [combiners.Combiner()],
    "layer": [layers.Layer(), layers.ham()],
}


def part_of(one: Broken) -> Any:
    return one.factory() if one.like is None else OpImplementation(one.like, one.factory())


def run(check: str, part: Any) -> None:
    options = settled(BY_NAME[check].kind, part, Options())
    BY_NAME[check](part, options=options, profile="ci", shrink=False)


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
