from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from hamblocks.testing import AttentionInputs, DeltaRuleInputs
from hamblocks_ops import (
    UnsupportedError,
    explain,
    gated_delta_rule,
    implementations,
    select_topk,
    selected_attention,
    surprise,
)
from hamblocks_ops.dispatch import Implementation, explain_table, launches, pick


def no_odd_numbers(call: Any) -> str | None:
    return f"{call} is odd" if call % 2 else None


def never(_call: Any) -> str:
    return "not built"


def broken(_call: Any) -> Any:
    raise AssertionError("run without being chosen")


TABLE = (
    Implementation("missing", broken, never),
    Implementation("halves", lambda call: call // 2, no_odd_numbers),
    Implementation("any", lambda call: call),
)


def test_auto_takes_the_first_that_can() -> None:
    assert pick("op", TABLE, "auto", 6)(6) == 3
    assert pick("op", TABLE, "auto", 7)(7) == 7
    assert pick("op", TABLE, "any", 6)(6) == 6


def test_naming_one_that_refuses_gives_its_reason() -> None:
    with pytest.raises(
        UnsupportedError, match=r"op cannot run this call with impl='halves'. halves: 7 is odd$"
    ):
        pick("op", TABLE, "halves", 7)
    with pytest.raises(UnsupportedError, match="missing: not built; halves: 7 is odd"):
        pick("op", TABLE[:2], "auto", 7)


@pytest.mark.parametrize("impl", ["fast", "", "Any"])
def test_unknown_names_are_told_the_choices(impl: str) -> None:
    with pytest.raises(
        ValueError, match=f"^impl: expected 'auto' or one of 'missing', 'halves', 'any'.*'{impl}'"
    ):
        pick("op", TABLE, impl, 6)


def test_auto_passes_over_what_is_there_for_those_who_name_it() -> None:
    table = (
        Implementation("slow", lambda call: -call, passed_over=lambda _: "it is slow"),
        *TABLE,
    )
    explanation = explain_table(table, 6)
    assert explanation["slow"] == "yes, when named: it is slow"
    assert explanation.chosen == "halves"
    assert pick("op", table, "slow", 6)(6) == -6
    assert pick("op", table, "auto", 6)(6) == TABLE[1].run(6)
    with pytest.raises(UnsupportedError, match="slow: it is slow"):
        pick("op", table[:2], "auto", 6)


def test_explanations_say_yes_or_why_not() -> None:
    explanation = explain_table(TABLE, 7)
    assert explanation == {"missing": "not built", "halves": "7 is odd", "any": "yes"}
    assert explanation.chosen == "any"
    assert str(explanation) == "missing: not built\nhalves: 7 is odd\nany: yes"
    assert explain_table(TABLE, 6).chosen == "halves"
    assert explain_table(TABLE[:1], 6).chosen is None


def test_every_op_explains_itself() -> None:
    rule, attention = DeltaRuleInputs().tensors(), AttentionInputs().tensors()
    calls = [
        (gated_delta_rule, rule),
        (selected_attention, attention),
        (surprise, {"residual": rule["v"], "v": rule["v"]}),
    ]
    for op, call in calls:
        explanation = explain(op, **call)
        assert explanation["reference"] == "yes"
        assert tuple(explanation) == implementations(op)
        with pytest.raises(
            ValueError, match=r"^impl: expected 'auto' or one of .*'reference'.*got 'quick'"
        ):
            op(**call, impl="quick")
        with pytest.raises(
            ValueError, match=r"^impl: expected the name of an implementation.*, got NoneType"
        ):
            op(**call, impl=None)
        result = op(**call)
        chosen = op(**call, impl=explanation.chosen)
        first, same = (x if isinstance(x, torch.Tensor) else x.out for x in (result, chosen))
        assert torch.equal(first, same)


def test_explain_checks_arguments_and_knows_its_ops() -> None:
    with pytest.raises(ValueError, match=r"^beta: "):
        explain(gated_delta_rule, **(DeltaRuleInputs().tensors() | {"beta": torch.zeros(1)}))
    for op in (select_topk, torch.add, explain):
        with pytest.raises(ValueError, match=r"^op: expected an op"):
            explain(op)


def test_kernels_run_on_the_device_of_what_they_are_given() -> None:
    """The current GPU is another one where a model is spread over several."""
    entered = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    class Far(torch.Tensor):
        device = torch.device("cuda:1")

    @launches
    def run(x: torch.Tensor | None, y: torch.Tensor, scale: float) -> float:
        assert entered[-1:] in ([torch.device("cuda:1")], [])
        return scale

    with patch.object(torch.cuda, "device", Device):
        assert run(None, torch.zeros(1), 2.0) == 2.0
        assert entered == []
        assert run(None, y=torch.zeros(1).as_subclass(Far), scale=3.0) == 3.0
    assert entered == [torch.device("cuda:1"), None]
