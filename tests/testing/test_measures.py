"""What the checks measure with: budgets, moved arithmetic, filled memory, reprs of inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import Tensor

from hamblocks import testing
from hamblocks.testing import (
    FilledMemory,
    LayerDims,
    PartInputs,
    Problem,
    assert_close,
    assert_close_to_reference,
    assert_same,
    attention_inputs,
    delta_rule_inputs,
    evict_at,
    lengths,
    paged_inputs,
    part_inputs,
    ragged_lengths,
    row_inputs,
    score_pieces,
    scores,
)
from hamblocks.testing.inputs.draw import lay_out
from hamblocks.testing.rounding import MovedByOneRounding
from hamblocks_ops import select_topk, surprise

X = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def total(x: Tensor = X) -> dict[str, Tensor]:
    return {"total": x.sum()}


def test_another_order_of_the_same_sum_is_the_same() -> None:
    assert_same(total(X.flip(0)), total(), total)
    other = {"total": X.cumsum(0)[-1]}
    assert not torch.equal(other["total"], total()["total"])
    assert_same(other, total(), total)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (
            {"total": X.sum() * (1 + 1e-12)},
            r"total \[\]: norm-relative error 1.00e-12, allowed is twice what rounding",
        ),
        ({"total": X.sum().float()}, r"total: torch.float32 here, torch.float64 there"),
        ({"total": X.sum()[None]}, r"total: \[1\] here, \[\] there"),
        ({"sum": X.sum()}, r"\['sum'\] here, \['total'\] there"),
        ({"total": X.sum() * math.nan}, r"total\[\]: nan, expected"),
    ],
)
def test_what_differs_is_told(got: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same(got, total(), total)


def test_integers_must_be_equal() -> None:
    ends = {"ends": torch.tensor([[1, 2]])}
    assert_same({"ends": torch.tensor([[1, 2]])}, ends, lambda: ends)
    with pytest.raises(AssertionError, match=r"ends\[0, 1\]: 3, expected 2"):
        assert_same({"ends": torch.tensor([[1, 3]])}, ends, lambda: ends)


def test_a_computation_that_varies_is_no_measure() -> None:
    def varies() -> dict[str, Tensor]:
        return {"total": X.sum() + torch.rand((), dtype=torch.float64)}

    with pytest.raises(AssertionError, match=r"total\[\]: .*, expected"):
        assert_same(varies(), varies(), varies)


def test_a_run_that_decides_otherwise_is_no_measure() -> None:
    def decides() -> dict[str, Tensor]:
        near = (X[:1] * 3 + X[:1]) / 4 - X[:1]  # 0, or a rounding of it
        return {"kept": near != 0, "y": torch.where(near != 0, 100.0, 1.0)}

    with pytest.raises(AssertionError, match="y "):
        assert_same(decides() | {"y": decides()["y"] + 1e-3}, decides(), decides)


def moved(run: Any, *, exact: bool) -> bool:
    plain = run()
    for seed in range(8):
        with MovedByOneRounding(seed, exact=exact):
            other = run()
        if not torch.equal(plain, other):
            torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)
            return True
    return False


LOWER = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.1, 0.7, 0]], dtype=torch.float64)
EXACT = {
    "minus itself": lambda: X - X,
    "plus zero": lambda: X + 0,
    "times two": lambda: X * 2,
    "over four": lambda: X / 4,
    "times one by a matrix": lambda: X[:3, None].mm(torch.ones(1, 1, dtype=torch.float64)),
    "sum of one": lambda: X[:, None].sum(1),
    "first row of a solution": lambda: torch.linalg.solve_triangular(
        LOWER, X[:3, None], upper=False, unitriangular=True
    )[0],
}
ROUNDED = {
    "plus": lambda: X + 0.1,
    "times": lambda: X * 0.1,
    "over": lambda: X / 3,
    "matrix": lambda: X[None].mm(X[:, None]),
    "sum": lambda: X.sum(),
    "softmax": lambda: X.softmax(0),
    "solution": lambda: torch.linalg.solve_triangular(
        LOWER, X[:3, None], upper=False, unitriangular=True
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_needs_no_rounding_is_moved_only_where_asked(name: str) -> None:
    assert not moved(EXACT[name], exact=True)
    assert moved(EXACT[name], exact=False)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("exact", [False, True])
def test_what_rounds_is_moved(name: str, exact: bool) -> None:
    assert moved(ROUNDED[name], exact=exact)


def test_moving_does_not_touch_copies_and_views() -> None:
    for run in (
        lambda: X.view(20, 20).mT.clone(),
        lambda: X[3:7],
        lambda: torch.cat([X, X]),
        lambda: X.where(X > 0, 0),
    ):
        assert not moved(run, exact=False)


def test_the_budget_of_a_dtype() -> None:
    exact = X[:16].view(1, 2, 2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(exact.to(dtype), exact)
        with pytest.raises(AssertionError, match="norm-relative error"):
            assert_close((exact * (1 + 3 * torch.finfo(dtype).eps)).to(dtype), exact)
    with pytest.raises(AssertionError, match="error of a norm that is to be 0"):
        assert_close(torch.full((2,), 1e-9), torch.zeros(2, dtype=torch.float64))


def test_a_wrong_implementation_is_far_from_the_reference() -> None:
    case = find(row_inputs(dtype=torch.float32, tokens=4, batch=1), lambda _: True)

    def op(impl: str, **call: Tensor) -> Tensor:
        score = surprise(**call)
        return score if impl == "reference" else score * (1 + 1e-5)

    problem = Problem(op, case.tensors())
    with pytest.raises(
        AssertionError,
        match=r"^mine: result .*norm-relative error .*the reference's own .*worst at",
    ):
        assert_close_to_reference(problem, "mine")


def test_integers_are_compared_with_the_reference_too() -> None:
    def op(impl: str, score: Tensor) -> Tensor:
        return select_topk(score, 2 if impl == "reference" else 3)

    score = torch.tensor([0.1, 0.5, 0.3, 0.9])[None, :, None]
    with pytest.raises(AssertionError, match=r"^mine: result\[0, \d, 0\]: \d+, expected \d+"):
        assert_close_to_reference(Problem(op, {"score": score}), "mine")


def test_filled_memory() -> None:
    with FilledMemory(math.nan):
        assert torch.empty(3).isnan().all()
        assert X.new_empty(3).isnan().all()
        assert torch.empty_like(X).isnan().all()
        assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()
        assert torch.empty(2, dtype=torch.bool).all()
    with FilledMemory(3.0):
        assert torch.empty(3).eq(3).all()
        assert torch.empty_strided((2, 2), (1, 2), dtype=torch.int64).eq(3).all()
        assert not torch.zeros(3).any()


STRATEGIES = [
    delta_rule_inputs(),
    attention_inputs(),
    paged_inputs(),
    row_inputs(),
    scores(),
    evict_at(),
    score_pieces(),
    part_inputs(),
]


@given(case=st.one_of(STRATEGIES))
def test_inputs_are_made_again_from_their_repr(case: Any) -> None:
    names = {name: getattr(testing, name) for name in testing.__all__} | {
        "torch": torch,
        "nan": math.nan,
        "inf": math.inf,
    }
    again = eval(repr(case), names)
    assert repr(again) == repr(case)
    if hasattr(case, "tensors"):
        for name, x in case.tensors().items():
            other = again.tensors()[name]
            assert x.stride() == other.stride()
            assert torch.equal(x.isnan(), other.isnan())
            assert torch.equal(x.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("wanted", [0, 1, 15, 16, 17])
def test_lengths_meet_the_borders_of_a_chunk(wanted: int) -> None:
    assert find(lengths(chunk=16, longest=3), lambda length: length == wanted) == wanted
    assert wanted in find(ragged_lengths(chunk=16, longest=3), lambda drawn: wanted in drawn)


@pytest.mark.parametrize("kind", ["ties", "constant", "infinite", "near"])
def test_kinds_of_scores(kind: str) -> None:
    score = testing.Scores(tokens=60, kind=kind).tensors()["score"]
    near = (score - 0.25).abs()
    told = {
        "ties": score.unique().numel() <= 5,
        "constant": score.unique().numel() == 1,
        "infinite": not score.isfinite().any(),
        "near": bool(((near > 0) & (near < 1e-6)).any()) and bool((near == 0).any()),
    }
    assert told[kind]


def test_layouts_hold_the_same_numbers() -> None:
    x = X[:24].view(2, 3, 4)
    for layout in ("transposed", "strided"):
        other = lay_out(x, layout)
        assert torch.equal(other, x)
        assert not other.is_contiguous()


def test_cases_say_only_what_differs() -> None:
    assert repr(PartInputs()) == "PartInputs()"
    dims = LayerDims(4, 1, 1, 4)
    assert repr(PartInputs(dims=dims, seed=3)) == (
        "PartInputs(dims=LayerDims(hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4), seed=3)"
    )
