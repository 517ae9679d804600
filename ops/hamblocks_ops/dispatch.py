"""How an op picks one of its implementations: an ordered table, a reason for every refusal, no silent fallback."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import check_impl


class UnsupportedError(NotImplementedError):
    """An implementation was named that cannot run this call; the message says why."""


def always(_call: Any) -> None:
    """For implementations that run every call."""
    return


class Implementation(NamedTuple):
    """One row of an op's table.

    `refuses(call)` returns why the implementation cannot run the call, or None when it can; `load()` imports it;
    `passed_over(call)` returns why "auto" leaves it to those who name it, or None.
    """

    name: str
    refuses: Callable[[Any], str | None]
    load: Callable[[], Callable[[Any], Any]]
    passed_over: Callable[[Any], str | None] = always


WHEN_NAMED = "yes, when named: "
"""Begins the answer of an implementation that can run a call, but that "auto" passes over."""


class Explanation(dict[str, str]):
    """Implementation name -> "yes" or the reason why not, in the order in which `auto` tries them.

    "yes, when named: ..." is one that can run the call and that `auto` passes over, with the reason.
    """

    @property
    def chosen(self) -> str | None:
        """What `impl="auto"` takes, None when nothing can run the call."""
        return next((name for name, answer in self.items() if answer == "yes"), None)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {answer}" for name, answer in self.items())


def explain_table(table: Sequence[Implementation], call: Any) -> Explanation:
    """Asks every implementation of a table about one call."""
    return Explanation({row.name: row.refuses(call) or _welcome(row, call) for row in table})


def _welcome(row: Implementation, call: Any) -> str:
    reason = row.passed_over(call)
    return "yes" if reason is None else WHEN_NAMED + reason


def pick(op: str, table: Sequence[Implementation], impl: str, call: Any) -> Callable[[Any], Any]:
    """The implementation that runs `call`.

    Raises:
        ValueError: `impl` is not a name of the table.
        UnsupportedError: the named implementation, or with "auto" every one, refuses the call.
    """
    check_impl(impl)
    reasons = []
    for row in table:
        if impl in ("auto", row.name):
            reason = row.refuses(call)
            if reason is None and impl == "auto":
                reason = row.passed_over(call)
            if reason is None:
                return row.load()
            reasons.append(f"{row.name}: {reason}")
    if not reasons:
        names = ", ".join(repr(row.name) for row in table)
        raise ValueError(f"impl: expected 'auto' or one of {names} for {op}, got {impl!r}")
    raise UnsupportedError(f"{op} cannot run this call with impl={impl!r}. " + "; ".join(reasons))


def implementations(op: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the implementations of `op`, in the order in which "auto" tries them; none if it has no choice."""
    table: Sequence[Implementation] = getattr(
        sys.modules.get(getattr(op, "__module__", "")), "TABLE", ()
    )
    return tuple(row.name for row in table)


def explain(op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Every implementation of `op` with "yes", or the reason why it cannot run `op(*args, **kwargs)`.

    Calls the `explain` that stands beside the op. Nothing is computed; arguments are checked as the op checks them.

    Raises:
        ValueError: `op` has no implementations to choose from, or an argument is bad.
    """
    beside = getattr(sys.modules.get(getattr(op, "__module__", "")), "explain", None)
    if beside is None or beside is explain:
        raise ValueError(f"op: expected an op of hamblocks.ops that takes impl=, got {op!r}")
    explanation: Explanation = beside(*args, **kwargs)
    return explanation


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1): on a CPU, and slowly."""
    if not installed("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported for that."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


# what torch.compiler.assume_constant_result does, without importing torch's compiler, which imports Triton
for _constant in (interpreting, installed):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010


def without_triton(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot run on this tensor, or None when it can."""
    if not installed("triton"):
        return "Triton is not installed (pip install hamblocks[gpu])"
    if interpreting():
        return None
    if tensor.device.type != "cuda":
        return f"Triton compiles for a GPU, the tensors are on {tensor.device} (TRITON_INTERPRET=1 runs it on a CPU)"
    return None


def launches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates what launches Triton kernels: they run on the GPU of its first tensor, whichever is the current one."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if first.device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    # torch.library reads the types off it, in the globals of this module if they were names
    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run


def interpreted(_call: Any) -> str | None:
    """Why "auto" passes over a Triton kernel in the interpreter."""
    return "Triton's interpreter is for tests" if interpreting() else None
