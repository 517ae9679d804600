"""The delta rule token by token in one kernel: against the definition, and what "auto" takes it for."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hamblocks.testing import DeltaRuleInputs
from hamblocks_ops import explain, gated_delta_rule
from hamblocks_ops.dispatch import WHEN_NAMED

triton = import_module("hamblocks_ops.gated_delta_rule.triton")
CASES = {
    "one token": DeltaRuleInputs(tokens=1, write="any"),
    "packed": DeltaRuleInputs(packed=(2, 0, 3), group=2),
    "strided": DeltaRuleInputs(tokens=3, layout="strided", group=2),
    "no state, no decay": DeltaRuleInputs(tokens=2, state=False, decay="none"),
    "odd sizes": DeltaRuleInputs(tokens=2, key_dim=7, value_dim=5),
    "a state in several programs": DeltaRuleInputs(tokens=2, key_dim=200, value_dim=130),
}


METRICS = ["cosine", "relative_l2", "l2", None]


def check(case: DeltaRuleInputs, metric: str | None, **more: bool) -> None:
    tensors = case.tensors()
    got, right = (
        gated_delta_rule(**tensors, metric=metric, impl=x, **more) for x in ("triton", "reference")
    )
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_is_the_definition_in_float64(case: str) -> None:
    for metric in METRICS:
        check(CASES[case], metric)


lengths = st.lists(st.integers(0, 3), min_size=1, max_size=3)
DRAWN = st.builds(
    DeltaRuleInputs,
    tokens=st.integers(0, 4),
    batch=st.integers(1, 2),
    packed=st.none() | lengths.map(tuple),
    heads=st.integers(1, 2),
    group=st.integers(1, 2),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "strided"]),
    decay=st.sampled_from(["none", "mild", "hard", "forget"]),
    write=st.sampled_from(["mild", "zero", "two", "any"]),
    state=st.booleans(),
    seed=st.integers(0, 99),
)


@given(DRAWN, st.sampled_from(METRICS), st.booleans())
def test_any_call_is_the_definition(
    case: DeltaRuleInputs, metric: str | None, output_residual: bool
) -> None:
    check(case, metric, output_residual=output_residual)


@given(DRAWN, st.sampled_from(METRICS[:3]))
def test_a_state_in_several_programs_is_one(case: DeltaRuleInputs, metric: str) -> None:
    """With tiles so small that a program holds one or a few columns of the state."""
    with patch.object(triton, "TILE_ENTRIES", 16):
        check(case, metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """The state is float32, and only results are rounded."""
    tensors = DeltaRuleInputs(tokens=4, key_dim=32, value_dim=32, dtype=dtype).tensors()
    got = gated_delta_rule(**tensors, metric="cosine", impl="triton")
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    right = gated_delta_rule(**wide, metric="cosine", impl="reference")
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


def answers(**case: Any) -> str:
    learns = case.pop("learns", False)
    tensors = DeltaRuleInputs(**case).tensors()
    if learns:
        tensors["q"].requires_grad_()
    return explain(gated_delta_rule, **tensors)["triton"]


def test_reasons() -> None:
    if not torch.cuda.is_available():
        assert answers(tokens=16) == WHEN_NAMED + "Triton's interpreter is for tests"
        assert answers(packed=(1,) * 20) == answers(tokens=16)
    slower = WHEN_NAMED + "token by token it is slower than chunks for more than 16 tokens"
    assert answers(tokens=17) == answers(packed=(17,)) == slower
    assert answers(tokens=1, learns=True) == "it has no gradient"
    assert answers(tokens=1, key_dim=1025) == "a tile holds keys of 1 to 1024 entries, not 1025"


def test_operator_is_registered_well() -> None:
    tensors = DeltaRuleInputs(tokens=2).tensors()
    names = ("q", "k", "v", "beta", "g", "initial_state")
    given = *(tensors[name] for name in names), None, 0.5
    for more in ((True, "cosine"), (False, None)):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(triton.steps, (*given, *more), test_utils=checks)
