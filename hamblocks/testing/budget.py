"""How far a result may stand from the reference: twice the error that the reference itself makes, plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hamblocks.testing.rounding import MovedByOneRounding

SAMPLES = 16


@dataclass
class Problem:
    """One call of an op, to be run by any of its implementations, in its own dtype or in another.

    Attributes:
        op: the public function; called as op(**tensors, **options, impl=...), it returns a NamedTuple or one tensor.
        tensors: tensors by argument name. Those of a floating dtype are differentiated.
        options: the other arguments.
        seed: of the cotangents, which are drawn for every result that carries a gradient.
        products: the dtype that an implementation feeds its matrix products with, where that is narrower than what
            the reference does; it may err by what that moves.
        yardstick: the implementation whose error, with its arithmetic moved, is the error that is allowed.
    """

    op: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    products: torch.dtype | None = None
    yardstick: str = "reference"

    @property
    def dtype(self) -> torch.dtype:
        """The lowest floating dtype among the tensors: what cotangents are rounded to, whatever dtype is run."""
        floating = [x.dtype for x in self.tensors.values() if x.is_floating_point()]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def run(
        self, impl: str, *, dtype: torch.dtype | None = None, backward: bool = True
    ) -> dict[str, Tensor]:
        """Results by field name, gradients as "grad of <argument>"; floating tensors in `dtype` where one is given."""
        leaves = {name: _leaf(x, dtype, backward) for name, x in self.tensors.items()}
        output = self.op(**leaves, **self.options, impl=impl)
        fields = output._asdict() if hasattr(output, "_asdict") else {"result": output}
        results = {name: x for name, x in fields.items() if x is not None}
        generator = torch.Generator().manual_seed(self.seed)
        roots, cotangents = [], []
        for name, x in results.items():
            cotangent = (
                torch.randn(x.shape, generator=generator, dtype=torch.float64)
                .to(self.dtype)
                .to(x.dtype)
            )
            if x.requires_grad and name not in (
                "lse",
                "score",
            ):  # these carry none in the ops that promise so
                roots.append(x)
                cotangents.append(cotangent)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        if roots:
            grads = torch.autograd.grad(
                roots, list(wanted.values()), cotangents, materialize_grads=True
            )
            results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return {name: x.detach() for name, x in results.items()}

    def noise(self) -> dict[str, float]:
        """Norm of the change in each forward result of the reference when its arithmetic is moved by one rounding."""
        plain, moved = self.run("reference", backward=False), self._moved(1, backward=False)
        return {
            name: float((moved[name] - x).masked_fill(~x.isfinite(), 0).norm())
            for name, x in plain.items()
        }

    def _moved(self, seed: int, *, backward: bool = True) -> dict[str, Tensor]:
        with MovedByOneRounding(seed, products=self.products):
            return self.run(self.yardstick, backward=backward)


def _leaf(x: Tensor, dtype: torch.dtype | None, backward: bool) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().to(dtype or x.dtype).requires_grad_(backward)


def assert_close_to_reference(problem: Problem, impl: str) -> dict[str, Tensor]:
    """`impl` is as right as the reference may claim to be, in every result and every gradient; returns the results.

    For each tensor, in the Euclidean norm over the whole of it and against the reference in float64:

        |got - exact| <= 2 own + eps(dtype of the result) |exact|

    `own` is the error of the reference in the problem's dtype. One run of the reference is one sample of that error,
    and on a small case a lucky one: a difference of two equal numbers, say the gradient of a softmax over one key,
    comes out as exactly 0 where another order of the same sums leaves one rounding. So where the plain budget is
    exceeded, the reference is run a few times more with every operand of its arithmetic moved by up to one rounding
    (Monte Carlo arithmetic, Parker 1997), and the largest error it then makes is its own. Nothing is picked by hand.
    In float64 it is the only yardstick, for there `exact` is the reference itself; and since `exact` then errs like any
    other run, its own error is allowed once more.

    NaN and infinities must stand exactly where they stand in float64, and integers must be equal.
    """
    got = problem.run(impl)
    once = problem.run("reference")
    exact = problem.run("reference", dtype=torch.float64)
    samples = [once]
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == once[name].dtype, (
            f"{name}: {value.dtype}, the reference gives {once[name].dtype}"
        )
        assert value.shape == once[name].shape, (
            f"{name}: {value.shape}, the reference gives {once[name].shape}"
        )
        if not value.is_floating_point():
            assert torch.equal(value, once[name]), f"{impl}: {_unequal(name, value, once[name])}"
            continue
        message = _report(name, value, [x[name] for x in samples], exact[name])
        while message and len(samples) <= SAMPLES:
            samples.append(problem._moved(seed=len(samples)))
            message = _report(name, value, [x[name] for x in samples], exact[name])
        assert not message, f"{impl}: {message}"
    return got


def assert_same(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rerun: Callable[[], Mapping[str, Tensor]],
) -> None:
    """Two ways to compute the same thing agree, in any dtype: neither is exact, each may err by what rounding does.

    Integers and booleans must be equal. Floating tensors may differ by one rounding; where they differ by more,
    `rerun`, which computes `expected` once more, is run with its arithmetic moved by up to one rounding to find out how
    much that changes, as in `assert_close_to_reference`. What is exact stays exact here (v - v is 0, and so is the
    prediction of an empty memory, of which the cosine is discontinuous), but for gradients: there one way may come to 0
    exactly and another to a rounding of its terms. A rerun that takes other decisions is no measure and does not count.

    Args:
        got: tensors by name.
        expected: the same names.
        rerun: computes `expected` anew.

    Raises:
        AssertionError: they do not agree; the message names the tensor and its worst element.
    """
    samples = _Samples(rerun, expected)
    assert got.keys() == expected.keys(), f"{sorted(got)} here, {sorted(expected)} there"
    for name, value in got.items():
        other = expected[name]
        assert value.dtype == other.dtype, f"{name}: {value.dtype} here, {other.dtype} there"
        assert value.shape == other.shape, (
            f"{name}: {list(value.shape)} here, {list(other.shape)} there"
        )
        if not value.is_floating_point():
            assert torch.equal(value, other), _unequal(name, value, other)
            continue
        message = _report(name, value, [], other)
        for number in range(1, SAMPLES + 1):
            if not message:
                break
            message = _report(name, value, samples.of(name, number), other, both=True)
        assert not message, message


def measured(
    results: Mapping[str, Tensor], rerun: Callable[[], Mapping[str, Tensor]], samples: int = 4
) -> dict[str, float]:
    """Norm of the change in each floating result when the arithmetic is moved by one rounding; NaN does not count."""
    own = {name: 0.0 for name, x in results.items() if x.is_floating_point()}
    for seed in range(samples):
        with MovedByOneRounding(seed, exact=True):
            moved = rerun()
        for name in own:
            difference = (moved[name].double() - results[name].double()).detach()
            own[name] = max(
                own[name], float(difference.masked_fill(~difference.isfinite(), 0).norm())
            )
    return own


def unlike(name: str, got: Tensor, expected: Tensor, *, own: float) -> str:
    """How a result differs from an earlier one beyond what rounding does to both (`own`); empty where it does not."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return f"{name}: {got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
    if not got.is_floating_point():
        return "" if torch.equal(got, expected) else _unequal(name, got, expected)
    return _report(name, got, [], expected, own, both=True)


class _Samples:
    """What a computation gives when its arithmetic is moved: half of the samples keep exact operations exact."""

    def __init__(
        self, rerun: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor]
    ) -> None:
        self.rerun, self.expected = rerun, expected
        self.taken: list[Mapping[str, Tensor]] = []

    def of(self, name: str, number: int) -> list[Tensor]:
        """That result in the first `number` samples, of those that are a measure for it."""
        if not self.taken:
            assert_bits(
                self.rerun(), self.rerun()
            )  # else the samples would tell how it varies, not what rounding does
        while len(self.taken) < number:
            turn = len(self.taken)
            with MovedByOneRounding(turn, exact=turn % 2 == 0):
                self.taken.append(self.rerun())
        gradient = name.startswith("grad of ")
        return [
            x[name]
            for turn, x in enumerate(self.taken[:number])
            if self._alike(x) and (gradient or turn % 2 == 0)
        ]

    def _alike(self, sample: Mapping[str, Tensor]) -> bool:
        return all(
            x.is_floating_point() or torch.equal(sample[name], x)
            for name, x in self.expected.items()
        )


def assert_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same bits; NaN equals NaN."""
    for name, other in expected.items():
        one = got[name]
        same = one.shape == other.shape and torch.equal(one.isnan(), other.isnan())
        same = same and torch.equal(
            one.masked_fill(one.isnan(), 0), other.masked_fill(other.isnan(), 0)
        )
        assert same, _unequal(name, one, other)


def _unequal(name: str, one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"{name}: {list(one.shape)} here, {list(other.shape)} there"
    at = tuple(int(i) for i in ((one != other) & ~(one.isnan() & other.isnan())).nonzero()[0])
    return f"{name}{list(at)}: {one[at].item()!r}, expected {other[at].item()!r}"


def assert_close(got: Tensor, expected: Tensor, name: str = "result", *, own: float = 0.0) -> None:
    """The same for one tensor whose exact value is at hand: |got - expected| <= 2 own + eps |expected|."""
    message = _report(name, got, [], expected, own)
    assert not message, message


def _report(
    name: str,
    got: Tensor,
    samples: list[Tensor],
    exact: Tensor,
    own: float = 0.0,
    *,
    both: bool = False,
) -> str:
    """What is wrong, or nothing. `both`: `exact` errs as well."""
    eps = torch.finfo(got.dtype).eps
    got, exact = got.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    same = torch.where(finite, got.isfinite(), (got == exact) | (got.isnan() & exact.isnan()))
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        return f"{name}{list(at)}: {float(got[at])}, expected {float(exact[at])}"
    if not bool(finite.any()):
        return ""
    difference = (got - exact).masked_fill(~finite, 0)
    size = exact.masked_fill(~finite, 0).norm()
    own = max([own, *(float((x.double() - exact).masked_fill(~finite, 0).norm()) for x in samples)])
    if both or eps == torch.finfo(torch.float64).eps:
        own *= 1.5
    if float(difference.norm()) <= 2 * own + eps * float(size):
        return ""
    at = tuple(int(i) for i in torch.unravel_index(difference.abs().argmax(), exact.shape))
    relative = "norm-relative error" if float(size) else "error of a norm that is to be 0"
    told = [f"{x / (float(size) or 1):.2e}" for x in (float(difference.norm()), own)]
    measure = "what rounding moves it by," if both else "the reference's own"
    return (
        f"{name} {list(exact.shape)}: {relative} {told[0]}, allowed is twice {measure} {told[1]} "
        f"and one rounding {eps:.2e}; worst at {list(at)}: {float(got[at])!r}, expected {float(exact[at])!r}"
    )
