"""How far two results may differ: twice the error of the reference itself, plus one rounding.

Nothing here is a tolerance picked by hand. The error of a computation is measured by running it
again with every operand of its arithmetic moved by up to one rounding (see `MovedByOneRounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hamblocks.testing.rounding import MovedByOneRounding

SAMPLES = 16
"""Most runs with moved arithmetic that one comparison makes."""


@dataclass
class Problem:
    """One call of an op, which any of its implementations can run, in its own dtype or in another.

    Attributes:
        op: the public function, called as `op(**tensors, **options, impl=...)`. It returns a
            NamedTuple or one tensor.
        tensors: tensors by argument name. Those of a floating dtype are differentiated.
        options: the other arguments.
        seed: seed of the cotangents. One is drawn for every result that carries a gradient.
        products: dtype in which an implementation computes its matrix products, where it is
            narrower than the reference's. The error that this causes is allowed.
        yardstick: the implementation whose error is allowed.
    """

    op: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    products: torch.dtype | None = None
    yardstick: str = "reference"

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest floating dtype of the tensors. Every run rounds its cotangents to it."""
        floating = [x.dtype for x in self.tensors.values() if x.is_floating_point()]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def run(
        self, impl: str, *, dtype: torch.dtype | None = None, backward: bool = True
    ) -> dict[str, Tensor]:
        """Runs the call, forward and backward.

        Args:
            impl: name of the implementation.
            dtype: dtype that floating tensors are cast to; None: they stay as they are.
            backward: whether to compute gradients.

        Returns:
            Results by field name, gradients by "grad of " and the name of the argument.
        """
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
            # no op promises a gradient of these
            if x.requires_grad and name not in ("lse", "score"):
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
        """How far one rounding moves each forward result of the reference, as a Euclidean norm."""
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
    """Asserts that every result and every gradient of `impl` is as exact as the reference.

    For each tensor, in the Euclidean norm over all its elements, with `exact` the reference in
    float64:

        |got - exact| <= 2 own + eps(dtype of the result) |exact|

    `own` is the error of the reference in the problem's dtype. One run of the reference is one
    sample of that error, and it can be too small: a difference of two equal numbers, for example
    the gradient of a softmax over one key, is exactly 0 in one order of the sums, and one rounding
    in another. Where the bound is exceeded, the reference is therefore run again, up to 16 times,
    with every operand of its arithmetic moved by up to one rounding (Monte Carlo arithmetic, Parker
    1997), and the largest error of these runs is taken. In float64 `exact` has this error as well,
    so `own` is allowed once more.

    NaN and infinities must be where they are in float64. Integers must be equal.

    Args:
        problem: the call.
        impl: name of the implementation.

    Returns:
        The results of `impl`, as `Problem.run` gives them.

    Raises:
        AssertionError: a result differs by more. The message names the tensor and its worst
            element.
    """
    __tracebackhide__ = True
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
    """Asserts that two ways to compute the same thing agree. Neither is exact, in any dtype.

    Integers and booleans must be equal. Floating tensors may differ by one rounding. Where they
    differ by more, `rerun` is run with its arithmetic moved by up to one rounding, and they may
    differ by what that changes, as in `assert_close_to_reference`.

    Operations without a rounding stay exact in these runs: `v - v` is 0, and so is the prediction
    of an empty memory, where the cosine is discontinuous. Gradients are the exception: one way may
    give exactly 0, and the other a rounding of the terms that cancel. A run whose integer results
    differ took other decisions and does not count.

    Args:
        got: tensors by name.
        expected: tensors by the same names.
        rerun: computes `expected` again.

    Raises:
        AssertionError: they differ. The message names the tensor and its worst element.
    """
    __tracebackhide__ = True
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
    """How far one rounding moves each floating result: the norm over its finite elements."""
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
    """How a result differs from an earlier one by more than rounding (`own`); empty: it agrees."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        wanted = f"{expected.dtype} {list(expected.shape)}"
        return f"{name}: {got.dtype} {list(got.shape)}, expected {wanted}"
    if not got.is_floating_point():
        return "" if torch.equal(got, expected) else _unequal(name, got, expected)
    return _report(name, got, [], expected, own, both=True)


class _Samples:
    """Runs of a computation with moved arithmetic; half of them keep exact operations exact."""

    def __init__(
        self, rerun: Callable[[], Mapping[str, Tensor]], expected: Mapping[str, Tensor]
    ) -> None:
        self.rerun, self.expected = rerun, expected
        self.taken: list[Mapping[str, Tensor]] = []

    def of(self, name: str, number: int) -> list[Tensor]:
        """A result in the first `number` samples, without the samples that do not count for it."""
        if not self.taken:
            # a computation that varies by itself would hide what rounding does
            assert_bits(self.rerun(), self.rerun())
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
    """Asserts the same bits; NaN equals NaN."""
    __tracebackhide__ = True
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
    """Asserts that a tensor is near its exact value: |got - expected| <= 2 own + eps |expected|.

    Args:
        got: the tensor.
        expected: its exact value, in a wider dtype.
        name: what the message calls it.
        own: the error that is allowed, as a Euclidean norm.

    Raises:
        AssertionError: it differs by more.
    """
    __tracebackhide__ = True
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
    """What is wrong with a result; empty: nothing.

    Args:
        name: what the message calls it.
        got: the result.
        samples: other runs, whose largest error is allowed.
        exact: what it is compared with.
        own: an error that is allowed at least.
        both: whether `exact` has that error too.
    """
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
        f"and one rounding {eps:.2e}; worst at {list(at)}: {float(got[at])!r}, "
        f"expected {float(exact[at])!r}"
    )
