"""What follows from the declaration of an op: its call, unchecked, explain, names, and hints."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from hamblocks.testing.ops import OPS as KNOWN
from hamblocks.testing.ops import OpImplementation
from hamblocks_ops import NEVER, OPS, explain, gated_delta_rule, implementations, surprise
from hamblocks_ops.declare import Hints, Op, OpWithChoice, op_with_choice
from hamblocks_ops.dispatch import Implementation


def checks_within(run: Any) -> Counter[str]:
    """How often each function that checks an argument is called."""
    seen: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, _arg: Any) -> None:
        name = frame.f_code.co_name
        if event == "call" and name.startswith(("check_", "_check_")):
            seen[name] += 1

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def decoding() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One token through each op."""
    x = torch.zeros(1, 1, 2, 64)
    calls = {op.__name__: op.example(x) for op in OPS if isinstance(op, OpWithChoice)}
    score = torch.zeros(1, 1, 2)
    for op, options in (("threshold", 0.5), ("topk", 1), ("window", 1), ("first", 1)):
        calls[f"select_{op}"] = ((score, options), {})
    return {name: call for name, call in calls.items() if call is not None}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_unchecked_checks_nothing_and_computes_the_same(op: Op[..., Any]) -> None:
    given, named = decoding()[op.__name__]
    with torch.no_grad():
        checked = checks_within(lambda: op(*given, **named))
        assert checked
        assert checks_within(lambda: op.unchecked(*given, **named)) == Counter()
        results = op(*given, **named), op.unchecked(*given, **named)
    one, other = ((x,) if isinstance(x, Tensor) else x for x in results)
    for a, b in zip(one, other, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_checks_of_decoding_do_not_grow() -> None:
    """Before there was one declaration for each op: 20, 4, 19 and 14."""
    most = {
        "gated_delta_rule": 20,
        "select_threshold": 4 + 2,  # two functions that call others
        "paged_attention": 19,
        "selected_attention": 14,
    }
    for op in OPS:
        if op.__name__ in most:
            given, named = decoding()[op.__name__]
            with torch.no_grad():
                seen = checks_within(lambda op=op, given=given, named=named: op(*given, **named))
            assert seen.total() - 1 <= most[op.__name__], seen  # the op's own function


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_checks_take_what_the_op_takes(op: Op[..., Any]) -> None:
    assert op._check is not None
    ours, theirs = (inspect.signature(one).parameters for one in (op, op._check))
    assert list(ours.values()) == list(theirs.values())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_an_op_is_known_by_its_name(op: Op[..., Any]) -> None:
    assert pickle.loads(pickle.dumps(op)) is op
    assert copy.deepcopy(op) is op
    assert op.__doc__
    assert op in KNOWN
    assert repr(op) == f"<op {op.__name__}>"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_hints_name_arguments_and_results(op: Op[..., Any]) -> None:
    hints, parameters = op.hints, inspect.signature(op).parameters
    named = [*hints.by_token, *(hints.streams or ())[:1]]
    named += [] if hints.threshold is None else [hints.threshold]
    assert set(named) <= set(parameters)
    part = OpImplementation(op)
    case = part.op.edges[-1]
    result = part(**case.tensors(), **part.op.options(case))
    fields = set(getattr(result, "_fields", ()))
    assert {*hints.by_sequence, *hints.lists, *(hints.streams or ())[1:]} <= fields
    assert (hints.packs is True) == ("cu_seqlens" in parameters)


def test_explain_takes_whatever_explains_itself() -> None:
    class Layer:
        def explain(self, x: int, *, y: int) -> str:
            return f"{x} and {y}"

    assert explain(Layer(), 1, y=2) == "1 and 2"
    call = {"residual": torch.ones(1, 2, 1, 3), "v": torch.ones(1, 2, 1, 3)}
    assert explain(surprise, **call) == surprise.explain(**call)
    assert surprise.implementations == implementations(surprise) == ("triton", "reference")


def halves(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Half of x."""
    return declared.request((x,), impl)


seen: list[bool] = []


def _remember(call: tuple[Tensor]) -> Tensor:
    seen.append(torch.is_autocast_enabled("cpu"))
    return call[0] / 2


declared = op_with_choice(
    Implementation("half", _remember),
    finish=lambda _call, x: x + 0,
    hints=Hints(),
    example=lambda x: ((x,), {}),
)(halves)


def test_autocast_does_not_reach_inside() -> None:
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(declared(torch.ones(2)), torch.full((2,), 0.5))
    assert seen == [False, False]


def test_call_of_is_what_implementations_get() -> None:
    call = gated_delta_rule.call_of(*(torch.zeros(1, 3, 2, 4),) * 3, beta=torch.zeros(1, 3, 2))
    assert call.scale == 0.5
    assert call.initial_state.shape == (1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"^beta: "):
        gated_delta_rule.call_of(*(torch.zeros(1, 3, 2, 4),) * 3, beta=torch.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "unchecked"])
def test_ops_are_traced_whole(how: str) -> None:
    select = next(op for op in OPS if op.__name__ == "select_window")

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        score, window = (getattr(op, how) if how else op for op in (surprise, select))
        return score(v, 2 * v, metric="l2"), window(v[..., 0], 2)

    v = torch.ones(1, 3, 2, 4)
    for got, wanted in zip(torch.compile(both, fullgraph=True)(v), both(v), strict=True):
        assert torch.equal(got, wanted)
    assert int(both(v)[1].max()) < NEVER
