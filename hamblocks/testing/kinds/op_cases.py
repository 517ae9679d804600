"""Chooses the cases of a check of an op: fixed and drawn ones that the implementation can run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

import hamblocks_ops as ops
from hamblocks.testing.check import Check, NotApplicableError, Options
from hamblocks.testing.inputs.ops import Calls
from hamblocks.testing.ops import OpImplementation
from hamblocks_ops.arguments import wrong
from hamblocks_ops.dispatch import interpreting

INTERPRETED = ("triton", "fla")
"""Implementations that Triton's interpreter runs."""
INTERPRETED_MAX_TOKENS = 32
"""Triton's interpreter takes seconds for long fixed cases. There, only the comparison with the
reference runs them, in the widest dtype, and the other checks draw half as many cases."""


def refusal(part: OpImplementation, case: Any) -> str | None:
    """Why an implementation cannot run a case with gradients on this machine, or None."""
    if part.run is None and part.impl != "auto" and ops.implementations(part.like):
        asked: Any = part.like
        asked = asked.explain
        if part.op.call is not None:
            asked = functools.partial(part.op.call, asked, impl=part.impl)
        tensors = {
            name: x.requires_grad_(x.is_floating_point()) for name, x in case.tensors().items()
        }
        answer: str = asked(**part.moved(tensors), **part.op.options(case)).get(part.impl, "yes")
        return None if answer.startswith("yes") else answer
    return None


def _length(case: Any) -> int:
    """How many tokens or keys a case has."""
    packed, cache = getattr(case, "packed", None), getattr(case, "cache", None)
    return sum(packed) if packed is not None else getattr(case, "tokens", 0) + (cache or 0)


@functools.cache
def refused_dtypes(part: OpImplementation) -> dict[torch.dtype, str]:
    """The floating dtypes in which the implementation runs no fixed case, with reasons."""
    if "dtype" not in part.op.fields:
        return {}
    found = {}
    for dtype in part.op.dtypes:
        answers = [refusal(part, replace(case, dtype=dtype)) for case in part.op.edges]
        if None not in answers:
            found[dtype] = str(answers[0])
    return found


@functools.cache
def never_runs(part: OpImplementation) -> str | None:
    """Why the implementation runs none of the fixed cases, e.g. because there is no GPU.

    None if it runs one of them.
    """
    if computes_in(part):
        return None
    answers = [refusal(part, case) for case in part.op.edges]
    return None if None in answers else str(answers[0])


def computes_in(part: OpImplementation) -> list[torch.dtype]:
    """The floating dtypes that the implementation computes in, the widest first."""
    return [dtype for dtype in part.op.dtypes if dtype not in refused_dtypes(part)]


@dataclass(frozen=True)
class OpCheck(Check):
    """A check of an op, whose cases depend on the op and the implementation.

    Attributes:
        fixed: fields with the same value in all drawn cases.
        by_hand: the fixed cases.
        drawn: whether to draw cases in addition to the fixed ones.
        long_in: the dtype in which Triton's interpreter runs long fixed cases too, if it is the
            widest that the implementation computes in.
    """

    fixed: Callable[[Calls], dict[str, Any]] = lambda _op: {}
    by_hand: Callable[[Calls], Sequence[Any]] = lambda op: op.edges
    drawn: bool = True
    long_in: torch.dtype | None = None

    def of(self, part: OpImplementation) -> Check:
        """The check with the cases of one op."""
        op, runs = part.op, computes_in(part)
        slowly = interpreting() and part.impl in INTERPRETED and self.long_in not in runs[:1]

        def cases(_options: Options) -> st.SearchStrategy[Any]:
            fixed = self.fixed(op)
            if len(runs) == len(op.dtypes):
                return op.inputs(**fixed)
            if fixed.get("dtype", torch.float64) not in runs:
                fixed["dtype"] = runs[0] if "dtype" in fixed else st.sampled_from(runs)
            return op.inputs(**fixed).filter(lambda case: refusal(part, case) is None)

        def edges(_options: Options) -> list[Any]:
            by_hand = self.by_hand(op)
            if len(runs) < len(op.dtypes):
                by_hand = [
                    case if case.dtype in runs else replace(case, dtype=runs[0]) for case in by_hand
                ]
            if slowly:
                by_hand = [case for case in by_hand if _length(case) <= INTERPRETED_MAX_TOKENS]
            return [case for case in by_hand if refusal(part, case) is None]

        drawn = cases if self.drawn else None
        share = self.share * (2 if slowly else 1)
        return Check(self.name, self.kind, self.body, drawn, edges, self.applies, share, self.slow)

    def why_not(self, part: Any, options: Options | None = None) -> str | None:
        """Why the check does not apply, or why the implementation runs no case on this machine."""
        reason = super().why_not(part, options)
        if reason is not None or not isinstance(part, OpImplementation):
            return reason
        try:
            return never_runs(part)
        except Exception:  # the check itself then fails with the same error
            return None

    def __call__(self, part: Any, case: Any = None, **more: Any) -> None:
        """Runs the check."""
        __tracebackhide__ = True
        if not isinstance(part, OpImplementation):
            raise wrong("part", "an OpImplementation(like, run)", repr(part))
        never = never_runs(part)
        if never is not None:
            raise NotApplicableError(self.name, repr(part), never)
        self.of(part)(part, case, **more)


def in_float64(op: Calls, **more: Any) -> dict[str, Any]:
    """dtype float64 and the fields in `more`, without those that cases of the op do not have."""
    return {name: x for name, x in ({"dtype": torch.float64} | more).items() if name in op.fields}


def plain(op: Calls) -> dict[str, Any]:
    """Fields of float64 cases without packed sequences, cache or padding."""
    return in_float64(op, packed=None, cache=None, empty_rows=False)


def whole(op: Calls) -> list[Any]:
    """The fixed cases without packed sequences and without a cache, in float64."""
    kept = [
        case
        for case in op.edges
        if getattr(case, "packed", None) is None and getattr(case, "cache", None) is None
    ]
    return [replace(case, **plain(op)) for case in kept]


def packed_cases(op: Calls) -> list[Any]:
    """The fixed cases with packed sequences, in float64."""
    return [
        replace(case, **in_float64(op, cache=None))
        for case in op.edges
        if getattr(case, "packed", None) is not None
    ]
