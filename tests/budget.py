"""How far a result may stand from the reference: twice the error that the reference itself makes, plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLES = 16


@dataclass
class Problem:
    """One call of an op, to be run by any of its implementations, in its own dtype or in another.

    Attributes:
        op: the public function; called as op(**tensors, **options, impl=...), it returns a NamedTuple or one tensor.
        tensors: tensors by argument name. Those of a floating dtype are differentiated.
        options: the other arguments.
        seed: of the cotangents, which are drawn for every result that carries a gradient.
    """

    op: Callable[..., Any]
    tensors: Mapping[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The lowest floating dtype among the tensors: what cotangents are rounded to, whatever dtype is run."""
        return max((x.dtype for x in self.tensors.values() if x.is_floating_point()), key=lambda d: torch.finfo(d).eps)

    def run(self, impl: str, *, dtype: torch.dtype | None = None, backward: bool = True) -> dict[str, Tensor]:
        """Results by field name, gradients as "grad of <argument>"; floating tensors in `dtype` where one is given."""
        leaves = {name: _leaf(x, dtype, backward) for name, x in self.tensors.items()}
        output = self.op(**leaves, **self.options, impl=impl)
        fields = output._asdict() if hasattr(output, "_asdict") else {"result": output}
        results = {name: x for name, x in fields.items() if x is not None}
        generator = torch.Generator().manual_seed(self.seed)
        roots, cotangents = [], []
        for name, x in results.items():
            cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(self.dtype).to(x.dtype)
            if x.requires_grad and name not in ("lse", "score"):  # these carry none in the ops that promise so
                roots.append(x)
                cotangents.append(cotangent)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        if roots:
            grads = torch.autograd.grad(roots, list(wanted.values()), cotangents, materialize_grads=True)
            results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return {name: x.detach() for name, x in results.items()}

    def noise(self) -> dict[str, float]:
        """Norm of the change in each forward result of the reference when its arithmetic is moved by one rounding."""
        plain, moved = self.run("reference", backward=False), self._moved(1, backward=False)
        return {name: float((moved[name] - x).masked_fill(~x.isfinite(), 0).norm()) for name, x in plain.items()}

    def _moved(self, seed: int, *, backward: bool = True) -> dict[str, Tensor]:
        with _MovedByOneRounding(seed):
            return self.run("reference", backward=backward)


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

    NaN and infinities must stand exactly where they stand in float64.
    """
    got = problem.run(impl)
    once = problem.run("reference")
    exact = problem.run("reference", dtype=torch.float64)
    samples = [once]
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == once[name].dtype, f"{name}: {value.dtype}, the reference gives {once[name].dtype}"
        assert value.shape == once[name].shape, f"{name}: {value.shape}, the reference gives {once[name].shape}"
        message = _report(name, value, [x[name] for x in samples], exact[name])
        while message and len(samples) <= SAMPLES:
            samples.append(problem._moved(seed=len(samples)))
            message = _report(name, value, [x[name] for x in samples], exact[name])
        assert not message, f"{impl}: {message}"
    return got


def assert_close(got: Tensor, expected: Tensor, name: str = "result", *, own: float = 0.0) -> None:
    """The same for one tensor whose exact value is at hand: |got - expected| <= 2 own + eps |expected|."""
    message = _report(name, got, [], expected, own)
    assert not message, message


def _report(name: str, got: Tensor, samples: list[Tensor], exact: Tensor, own: float = 0.0) -> str:
    """What is wrong, or nothing."""
    eps = torch.finfo(got.dtype).eps
    got, exact = got.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    same = torch.where(finite, got.isfinite(), (got == exact) | (got.isnan() & exact.isnan()))
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        return f"{name}{list(at)}: {float(got[at])}, exact is {float(exact[at])}"
    if not bool(finite.any()):
        return ""
    difference = (got - exact).masked_fill(~finite, 0)
    size = exact.masked_fill(~finite, 0).norm()
    own = max([own, *(float((x.double() - exact).masked_fill(~finite, 0).norm()) for x in samples)])
    if eps == torch.finfo(torch.float64).eps:
        own *= 1.5
    if float(difference.norm()) <= 2 * own + eps * float(size):
        return ""
    at = tuple(int(i) for i in torch.unravel_index(difference.abs().argmax(), exact.shape))
    error, own = (f"{x / max(float(size), 1e-300):.2e}" for x in (float(difference.norm()), own))
    return (
        f"{name} {list(exact.shape)}: norm-relative error {error}, allowed is twice the reference's own {own} "
        f"and one rounding {eps:.2e}; worst at {list(at)}: {float(got[at])!r}, exact is {float(exact[at])!r}"
    )


class _MovedByOneRounding(TorchDispatchMode):
    """Moves the floating operands of arithmetic by up to one rounding of their dtype; exact operations stay exact."""

    ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "exp", "log", "sum", "mean", "sqrt", "pow", "mm", "bmm")

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__.split(".")[0] in self.ARITHMETIC:
            args = tuple(self._moved(x) for x in args)
        return func(*args, **(kwargs or {}))

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        step = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return x * (1 + torch.finfo(x.dtype).eps * step).to(x.dtype)
