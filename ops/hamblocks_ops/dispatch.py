"""How an op picks an implementation: an ordered table, reasons for refusals, no silent fallback.

Also what refusals ask of the machine: which packages are installed, and whether Triton can compile
or interprets.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hamblocks_ops.arguments import wrong

Call = TypeVar("Call")
Raw = TypeVar("Raw")
Told = TypeVar("Told", covariant=True)


class UnsupportedError(NotImplementedError):
    """The named implementation, or with "auto" every one, cannot run this call.

    The message says why.
    """


def always(_call: object) -> None:
    """Refuses no call: the default of an implementation that runs every call."""
    return


@dataclass(frozen=True)
class Implementation(Generic[Call, Raw]):
    """One row of an op's table.

    Attributes:
        name: what `impl` names it by.
        run: computes a call. It imports what needs more than torch when it is called, not before.
        refuses: why the implementation cannot run a call, or None when it can.
        passed_over: why "auto" does not take the implementation, though it can run the call, or
            None.
        opaque: whether it is an operator that torch differentiates by its registered formula alone.
            Such an operator refuses every call under a transform of `torch.func` or forward-mode
            differentiation: torch would stop, or lose the derivative without an error.
    """

    name: str
    run: Callable[[Call], Raw]
    refuses: Callable[[Call], str | None] = always
    passed_over: Callable[[Call], str | None] = always
    opaque: bool = False


TRANSFORMED = "transforms of torch.func and forward-mode derivatives need plain torch"
"""Why an opaque implementation does not run."""

WHEN_NAMED = "yes, when named: "
"""Start of the answer of an implementation that can run a call, but that "auto" passes over."""


class Explanation(dict[str, str]):
    """Implementation name -> "yes" or the reason why not, in the order in which `auto` tries them.

    "yes, when named: ..." is the answer of an implementation that can run the call and that `auto`
    passes over, with the reason.
    """

    @property
    def chosen(self) -> str | None:
        """The implementation that `impl="auto"` takes; None if nothing can run the call."""
        return next((name for name, answer in self.items() if answer == "yes"), None)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {answer}" for name, answer in self.items())


def explain_table(table: Sequence[Implementation[Call, Any]], call: Call) -> Explanation:
    """Asks every implementation of a table about one call."""
    return Explanation({row.name: _refusal(row, call) or _answer_of(row, call) for row in table})


def _answer_of(row: Implementation[Call, Any], call: Call) -> str:
    """The answer of an implementation that can run the call."""
    reason = row.passed_over(call)
    return "yes" if reason is None else WHEN_NAMED + reason


def _refusal(row: Implementation[Call, Any], call: Call) -> str | None:
    """Why an implementation cannot run a call, or None when it can."""
    reason = row.refuses(call)
    return TRANSFORMED if reason is None and row.opaque and transformed() else reason


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode derivatives is active."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def pick(
    op: str, table: Sequence[Implementation[Call, Raw]], impl: str, call: Call
) -> Callable[[Call], Raw]:
    """What runs `call`: the implementation `impl`, or with "auto" the first that takes the call.

    Raises:
        ValueError: `impl` is not a name of the table.
        UnsupportedError: the named implementation, or with "auto" every one, refuses the call.
    """
    reasons = []
    for row in table:
        if impl in ("auto", row.name):
            reason = row.refuses(call)
            if reason is None and impl == "auto":
                reason = row.passed_over(call)
            if reason is None and row.opaque and transformed():
                reason = TRANSFORMED
            if reason is None:
                return row.run
            reasons.append(f"{row.name}: {reason}")
    if not isinstance(impl, str):
        raise wrong("impl", "the name of an implementation or 'auto'", impl)
    if not reasons:
        names = ", ".join(repr(row.name) for row in table)
        raise wrong("impl", f"'auto' or one of {names} for {op}", repr(impl))
    raise UnsupportedError(f"{op} cannot run this call with impl={impl!r}. " + "; ".join(reasons))


@runtime_checkable
class Explains(Protocol[Told]):
    """What `explain` takes: an op with a choice of implementations, or a layer."""

    def explain(self, *args: Any, **kwargs: Any) -> Told:
        """Which implementation runs a call with these arguments, and the reasons."""
        ...


def implementations(op: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the implementations of `op`, in the order in which "auto" tries them.

    Empty if it has no choice.
    """
    names: tuple[str, ...] = getattr(op, "implementations", ())
    return names


def explain(op: Explains[Told], /, *args: Any, **kwargs: Any) -> Told:
    """Which implementation would run `op(*args, **kwargs)`, and why not the others.

    Args:
        op: an op of hamblocks.ops that takes `impl`, or anything else with a method `explain`, such
            as a layer.
        *args: the arguments of the call, checked as the op checks them.
        **kwargs: the same, by name.

    Returns:
        What `op.explain(*args, **kwargs)` returns; of an op an `Explanation`: every implementation
        with "yes", or the reason why it cannot run the call. Nothing is computed.

    Raises:
        ValueError: `op` has no implementations to choose from, or an argument is bad.
    """
    if not isinstance(op, Explains):
        raise wrong(
            "op", "an op of hamblocks.ops that takes impl=, or what has an explain method", repr(op)
        )
    return op.explain(*args, **kwargs)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1): on a CPU, and slowly."""
    if not installed("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported for that."""
    return package in sys.modules or _found(package)


@functools.cache
def _found(package: str) -> bool:
    # cached, because ops ask at every call and the answer takes a walk over sys.path
    return importlib.util.find_spec(package) is not None


# what torch.compiler.assume_constant_result does, without importing torch's compiler, which imports
# Triton
for _constant in (interpreting, installed):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010


def without_triton(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot run on this tensor, or None when it can."""
    if not installed("triton"):
        return "Triton is not installed (pip install hamblocks[gpu])"
    if interpreting():
        return None
    if tensor.device.type != "cuda":
        return (
            f"Triton compiles for a GPU, the tensors are on {tensor.device} (TRITON_INTERPRET=1 "
            "runs it on a CPU)"
        )
    return None


def interpreted(_call: object) -> str | None:
    """Why "auto" passes over a Triton kernel in the interpreter."""
    return "Triton's interpreter is for tests" if interpreting() else None


def launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that launches Triton kernels: they run on the GPU of its first tensor.

    Triton launches on the current GPU, which is another one where a model is spread over several.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if first.device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    # torch.library reads the types off the signature; names would be looked up in the globals of
    # this module
    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run
