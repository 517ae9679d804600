"""Implementations of ops as parts that the kit checks: ours by name, or a user's own callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hamblocks_ops as ops
from hamblocks.testing.budget import Problem, assert_bits
from hamblocks.testing.inputs.ops import CALLS, Calls
from hamblocks.testing.settings import chosen
from hamblocks_ops.arguments import wrong
from hamblocks_ops.declare import Hints

OPS: dict[Callable[..., Any], Calls] = {op: CALLS[op.__name__] for op in ops.OPS}
"""Every op with its calls."""


@dataclass(frozen=True)
class OpImplementation:
    """One way to compute an op: an implementation by name, or a callable of a user's own.

    Attributes:
        like: the op of `hamblocks.ops` whose signature and mathematics it has.
        run: a callable with the op's signature, without `impl`; None: the op itself.
        impl: the implementation to be named, where `run` is None; "auto" is what the op would take.
        device: where it runs; empty: the device that --hamblocks-device names, else the CPU. Inputs
            are moved there and results back, so that they are compared with the reference on the
            CPU.
    """

    like: Callable[..., Any]
    run: Callable[..., Any] | None = None
    impl: str = "auto"
    device: str = ""

    def __post_init__(self) -> None:
        """Checks that `like` is an op of hamblocks.ops and has the implementation `impl`."""
        object.__setattr__(self, "device", self.device or chosen().device)
        if self.like not in OPS:
            raise wrong("like", "one of " + ", ".join(one.__name__ for one in OPS), repr(self.like))
        names = ops.implementations(self.like)
        if self.run is None and self.impl != "auto" and self.impl not in names:
            raise wrong(
                "impl",
                f"'auto' or one of {', '.join(map(repr, names))} for {self.like.__name__}",
                repr(self.impl),
            )

    @property
    def op(self) -> Calls:
        """How its op is called."""
        return OPS[self.like]

    @property
    def hints(self) -> Hints:
        """What its op promises."""
        like: Any = self.like  # any callable to users, but one of OPS since __post_init__
        hints: Hints = like.hints
        return hints

    def __call__(self, **call: Any) -> Any:
        """Runs it on its device; results are on the CPU.

        Raises:
            AssertionError: it changed an input on another device. On the CPU a check of its own
                looks for that.
        """
        if self.device == "cpu":
            return self._run(**call)
        there = self.moved(call)
        result = self._run(**there)
        given = {name: x.detach() for name, x in call.items() if isinstance(x, Tensor)}
        assert_bits({name: there[name].detach().cpu() for name in given}, given)
        if isinstance(result, Tensor):
            return result.cpu()
        return type(result)(*(None if x is None else x.cpu() for x in result))

    def moved(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, tensors on its device with the strides that they have."""
        return {
            name: _to(x, self.device) if isinstance(x, Tensor) else x for name, x in call.items()
        }

    def _run(self, **call: Any) -> Any:
        through = self.op.call
        if through is not None:
            return through(self.run, impl=self.impl, **call)
        if self.run is not None:
            return self.run(**call)
        return self.like(**call, **({"impl": self.impl} if ops.implementations(self.like) else {}))

    def reference(self, **call: Any) -> Any:
        """Runs the reference."""
        if self.op.call is not None:
            return self.op.call(None, impl="reference", **call)
        return (
            self.like(**call, impl="reference")
            if self.op.reference is None
            else self.op.reference(**call)
        )

    def problem(
        self, case: Any, tensors: Mapping[str, Tensor] | None = None, **options: Any
    ) -> Problem:
        """A case as a call that this implementation or the reference runs."""

        def either(impl: str, **call: Any) -> Any:
            if impl == "yardstick":
                return self.op.yardsticks[self.impl](**call)
            return self.reference(**call) if impl == "reference" else self(**call)

        given = case.tensors() if tensors is None else tensors
        problem = Problem(either, given, self.op.options(case) | options, seed=case.seed)
        if self.impl in self.op.yardsticks and problem.dtype in (torch.bfloat16, torch.float16):
            problem.products, problem.yardstick = problem.dtype, "yardstick"
        return problem

    def __repr__(self) -> str:
        name = f"impl={self.impl!r}"
        if self.run is not None:
            name = getattr(self.run, "__qualname__", type(self.run).__name__)
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"OpImplementation({self.like.__name__}, {name}{device})"


def _to(x: Tensor, device: str) -> Tensor:
    """A copy on a device with the strides that x has here."""
    result = x.to(device)
    if result is x or result.stride() == x.stride() or 0 in x.stride():
        return result
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
