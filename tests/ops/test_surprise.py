from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import (
    Draw,
    Problem,
    assert_close,
    assert_close_to_reference,
    dtypes,
    layouts,
    seeds,
)
from hamblocks_ops import surprise

METRICS = ("cosine", "relative_l2", "l2")
sizes = st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 3), st.integers(1, 9))


def formula(residual: Tensor, v: Tensor, metric: str) -> Tensor:
    """In float64, as the docstring writes it."""
    residual, v = residual.double(), v.double()
    p = v - residual
    if metric == "cosine":
        return 1 - (p * v).sum(-1) / (p.square().sum(-1).sqrt() * v.square().sum(-1).sqrt())
    if metric == "relative_l2":
        return residual.square().sum(-1).sqrt() / v.square().sum(-1).sqrt()
    return residual.square().sum(-1) / v.shape[-1]


@pytest.mark.parametrize("metric", METRICS)
@given(size=sizes, dtype=dtypes, layout=layouts, seed=seeds)
@example(size=(0, 0, 1, 1), dtype=torch.float32, layout="contiguous", seed=0)
@example(size=(1, 1, 1, 1), dtype=torch.bfloat16, layout="strided", seed=0)
def test_is_its_formula(
    metric: str, size: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int
) -> None:
    draw = Draw(seed, layout)
    v = draw.normal(*size, dtype=dtype)
    residual = (0.5 * v + draw.normal(*size)).to(dtype)
    problem = Problem(surprise, {"residual": residual, "v": v}, {"metric": metric})
    got = assert_close_to_reference(problem, "auto")["result"]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the largest intermediate of 1 - cos is 1, so one rounding of it is all the noise there is
    own = problem.noise()["result"] + torch.finfo(got.dtype).eps * got.numel() ** 0.5
    assert_close(got, formula(residual, v, metric), own=own)
    assert bool((got >= 0).all()) or metric == "cosine"
    if metric == "cosine":
        assert bool((got >= -1e-6).all())
        assert bool((got <= 2 + 1e-6).all())


@pytest.mark.parametrize("metric", METRICS)
@given(scale=st.sampled_from([1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e19, 1e30]), seed=seeds)
def test_directions_do_not_depend_on_size(metric: str, scale: float, seed: int) -> None:
    """No square over- or underflows: cosine and relative_l2 of a row are those of the row times any
    power of two."""
    draw = Draw(seed)
    v, residual = (
        draw.normal(1, 5, 2, 4, dtype=torch.float32),
        draw.normal(1, 5, 2, 4, dtype=torch.float32),
    )
    exponent = round(torch.tensor(scale, dtype=torch.float64).log2().item())
    # a tiny row must keep normal entries, or it is another row
    v, residual = (
        x.sign() * x.abs().clamp(min=2**-3) * (8 if scale < 1 else 1) for x in (v, residual)
    )
    big_v, big_residual = (torch.ldexp(x, torch.tensor(exponent)) for x in (v, residual))
    if metric == "l2":
        got = surprise(big_residual, big_v, metric=metric)
        exact = formula(big_residual, big_v, metric).clamp(max=torch.finfo(torch.float32).max)
        assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-44)
        return
    assert torch.equal(
        surprise(big_residual, big_v, metric=metric), surprise(residual, v, metric=metric)
    )


EXTREMES = [0.0, 1e-45, 1e-38, -1e-38, 1e-20, 1.0, -1.0, 1e20, 1e30, -1e30]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(rows=st.lists(st.tuples(*[st.sampled_from(EXTREMES)] * 4), min_size=1, max_size=6))
@example(
    rows=[
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 1e30, -1e30),
        (1e30, 1e30, 1e30, 1e30),
        (1e-38, 0.0, 1e-38, 0.0),
    ]
)
def test_always_finite(metric: str, dtype: torch.dtype, rows: list[tuple[float, ...]]) -> None:
    table = torch.tensor(rows, dtype=torch.float64).to(dtype)
    residual, v = (x[None, :, None].clone().requires_grad_() for x in (table[:, :2], table[:, 2:]))
    score = surprise(residual, v, metric=metric)
    assert bool(score.isfinite().all())
    grads = torch.autograd.grad(score.sum(), (residual, v), materialize_grads=True)
    if metric == "cosine":
        prediction = (v.detach() - residual.detach()).to(score.dtype)
        assert bool((score >= -1e-6).all())
        assert bool((score <= 2 + 1e-6).all())
        blank = ((prediction == 0).all(-1) | (v == 0).all(-1)) & ~(residual.isnan()).any(-1)
        assert bool((score[blank] == 1).all())
        assert all(not grad[blank].any() for grad in grads)
    if metric == "relative_l2":
        blank = (v == 0).all(-1)
        assert bool((score[blank] == 1).all())
        assert all(not grad[blank].any() for grad in grads)
    assert not any(bool(grad.isnan().any()) for grad in grads)


@pytest.mark.parametrize(
    ("residual", "score"),
    [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (0.5, 0.0)],
    ids=["right", "nothing", "opposite", "half"],
)
def test_cosine_by_hand(residual: float, score: float) -> None:
    """The prediction is (1 - residual) v: right, nothing at all, the opposite, and half of it."""
    v = torch.tensor([3.0, -4.0])[None, None, None]
    assert surprise(residual * v, v).item() == pytest.approx(score, abs=1e-6)


@given(seed=seeds, factor=st.floats(1, 100))
def test_a_larger_miss_is_a_larger_score(seed: int, factor: float) -> None:
    draw = Draw(seed)
    v, residual = draw.normal(1, 3, 1, 4), draw.normal(1, 3, 1, 4)
    for metric in ("relative_l2", "l2"):
        small, large = (surprise(x * residual, v, metric=metric) for x in (1.0, factor))
        assert bool((large >= small).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_smallest_normal_number_is_not_yet_zero(dtype: torch.dtype) -> None:
    v = torch.full((1, 1, 1, 2), torch.finfo(dtype).tiny, dtype=dtype)
    assert surprise(2 * v, v, metric="relative_l2").item() == 2
    assert surprise(v, v / 2, metric="relative_l2").item() == 1


@pytest.mark.parametrize("metric", ["relative_l2", "l2"])
def test_nothing_missed_is_no_surprise(metric: str) -> None:
    v = torch.tensor([3.0, -4.0])[None, None, None]
    assert surprise(torch.zeros_like(v), v, metric=metric).item() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_pieces_have_the_same_bits(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(0)
    residual, v = (draw.normal(2, 9, 2, 4).requires_grad_() for _ in range(2))
    whole = surprise(residual, v, metric=metric)
    wanted = torch.autograd.grad(whole.sum(), (residual, v), materialize_grads=True)
    monkeypatch.setattr(import_module("hamblocks_ops.surprise.reference"), "ENTRIES", 33)
    got = surprise(residual, v, metric=metric)
    gradients = torch.autograd.grad(got.sum(), (residual, v), materialize_grads=True)
    assert torch.equal(got, whole)
    for x, y in zip(gradients, wanted, strict=True):
        assert torch.equal(x, y)
