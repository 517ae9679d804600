"""What a check is, how it runs over drawn cases, and what it says when it fails."""

from __future__ import annotations

import copy
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

import hamblocks_ops
from hamblocks.protocols import LayerDims
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.settings import Profile, profile_of


class CheckFailed(AssertionError):  # noqa: N818 - pytest names its own this way
    """A part failed a check. The message says which one, what was seen, and how to repeat it.

    Attributes:
        error: the exception that the law or the part raised, with its traceback; None: unknown.
    """

    error: Exception | None = None


class NotApplicableError(ValueError):
    """A check was called with a part that it does not apply to.

    Attributes:
        reason: why it does not apply.
    """

    def __init__(self, check: str, part: str, reason: str) -> None:
        super().__init__(f"part: expected one that {check} applies to, got {part}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Options:
    """What a part can be run with.

    Attributes:
        dims: sizes of the layer that the part is made for; None: several sizes are drawn.
        dtypes: floating dtypes that the part computes in. Laws that compare two results use the
            first one, which should be the widest.
    """

    dims: LayerDims | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES


Applies = Callable[[Any, Options], "str | None"]
Body = Callable[[Any, Any, Options], None]
Failure = tuple[Any, Exception]
"""The case that failed, and the exception."""


def always(_part: object, _options: Options) -> None:
    """`Check.applies` of a check that applies to every part of its kind."""
    return


@dataclass(frozen=True)
class Check:
    """One named law for one kind of part. Call it with a part to run it.

    Attributes:
        name: "check_", the kind, and the law.
        kind: gate, selector, memory, controller, attention, combiner, query_gate, op or layer.
        body: `body(part, case, options)` raises an exception where the law does not hold.
        cases: strategy of the drawn cases; None: only the edges are run.
        edges: cases by hand, which run before the drawn ones.
        applies: returns why the check does not apply to a part, or None where it applies.
        share: the check draws the profile's number of cases divided by this, but at least 2.
        slow: whether the check takes seconds.
    """

    name: str
    kind: str
    body: Body
    cases: Callable[[Options], st.SearchStrategy[Any]] | None = None
    edges: Callable[[Options], Sequence[Any]] = field(default=lambda _options: ())
    applies: Applies = always
    share: int = 1
    slow: bool = False

    @property
    def law(self) -> str:
        """The name without "check_" and the kind."""
        return self.name.removeprefix(f"check_{self.kind}_")

    @property
    def purpose(self) -> str:
        """The law in one sentence."""
        return (self.body.__doc__ or "").strip().partition("\n")[0]

    def __call__(
        self,
        part: Any,
        case: Any = None,
        *,
        options: Options | None = None,
        profile: str | Profile | None = None,
        seed: int | None = None,
        shrink: bool = True,
        edges: bool = True,
        called: str | None = None,
    ) -> None:
        """Runs the check.

        Args:
            part: the part; the check runs copies of it.
            case: run this case alone; None: run the edges, then the drawn cases.
            options: what the part can be run with.
            profile: "dev", "ci" or "nightly"; None: --hamblocks-profile where pytest was given it,
                else "ci" where the environment variable CI is set, else "dev".
            seed: draw the cases of this seed; None: the profile decides whether cases differ from
                run to run.
            shrink: whether to look for a smaller case that fails too.
            edges: whether to run the edges.
            called: the expression that makes the part, for the message; None: its repr.

        Raises:
            CheckFailed: the law does not hold.
            NotApplicableError: the check does not apply to this part. It is a ValueError.
            RuntimeError: Python runs with -O, which removes the `assert` statements of a check.
        """
        __tracebackhide__ = True
        if not __debug__:
            raise RuntimeError(
                f"{self.name}: expected Python without -O, which removes its asserts"
            )
        options = options or Options()
        reason = self.why_not(part, options)
        if reason is not None:
            raise NotApplicableError(self.name, name_of(part), reason)
        called = called or name_of(part)
        if case is not None:
            failure = self._once(part, case, options)
        else:
            failure = self._edges(part, options) if edges else None
            failure = failure or self._drawn(part, options, profile_of(profile), seed, shrink)
        if failure is not None:
            raise self._failed(failure, called, options)

    def why_not(self, part: Any, options: Options | None = None) -> str | None:
        """Why the check does not apply to a part; None where it applies.

        A part that fails while this is looked up gets None: the check then shows the failure.
        """
        if self.applies is always:
            return None  # no copy: a suite asks this of every part and check
        try:
            return self.applies(copy.deepcopy(part), options or Options())
        except Exception:
            return None

    def _once(self, part: Any, case: Any, options: Options) -> Failure | None:
        try:
            self.body(copy.deepcopy(part), case, options)
        except Exception as error:
            return case, error
        return None

    def _edges(self, part: Any, options: Options) -> Failure | None:
        failures = (self._once(part, edge, options) for edge in self.edges(options))
        return next((failure for failure in failures if failure is not None), None)

    def _drawn(
        self, part: Any, options: Options, profile: Profile, seed: int | None, shrink: bool
    ) -> Failure | None:
        """The smallest drawn case that fails."""
        if self.cases is None:
            return None
        settings = hypothesis.settings(
            max_examples=max(profile.examples // self.share, 2),
            derandomize=profile.derandomize and seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        )
        return _smallest(
            lambda case: self.body(copy.deepcopy(part), case, options),
            self.cases(options),
            settings,
            seed,
        )

    def _failed(self, failure: Failure, called: str, options: Options) -> CheckFailed:
        """The error to raise. It has no cause: its traceback would show the code of the checks."""
        case, error = failure
        said = isinstance(error, AssertionError) and str(error)
        what = plain(error) if said else f"{type(error).__name__}: {error}{_place(error)}"
        more = "" if options == Options() else f", options={options!r}"
        failed = CheckFailed(
            f"{self.name}: {called}\n  {what}\n  law: {self.purpose}\n"
            f"  again: {self.name}({called}, {case!r}{more})"
        )
        failed.error = error
        return failed

    def __repr__(self) -> str:
        return self.name


def _smallest(
    body: Callable[[Any], None],
    cases: st.SearchStrategy[Any],
    settings: hypothesis.settings,
    seed: int | None,
) -> Failure | None:
    """Runs `body` over drawn cases: the smallest failing case that hypothesis finds."""
    failing: list[Failure] = []

    def test(case: Any) -> None:
        try:
            body(case)
        except hypothesis.errors.HypothesisException:
            raise
        except Exception as error:
            failing.append((case, error))
            raise

    run = settings(hypothesis.given(cases)(test))
    if seed is not None:
        run = hypothesis.seed(seed)(run)
    try:
        run()
    except Exception:
        if not failing:
            raise
        return failing[-1]  # the last one that hypothesis runs is the smallest
    return None


_LIBRARIES = (
    str(Path(__file__).parents[1]),
    *(str(Path(module.__file__ or "").parent) for module in (hamblocks_ops, hypothesis, torch)),
)
"""Folders of hamblocks and of what runs beneath it: no line there is by the author of a part."""


def _place(error: Exception) -> str:
    """The last line by the author of the part that led to an exception; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _of_a_library(frame.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""


def _of_a_library(file: str) -> bool:
    installed = "site-packages" in file  # which is inside of the folder of the standard library
    return file.startswith(_LIBRARIES) or (
        file.startswith(sysconfig.get_path("stdlib")) and not installed
    )


def plain(error: Exception) -> str:
    """The message of an assertion without what pytest and gradcheck append to it.

    pytest's assertion rewriting appends the compared values, `gradcheck` appends whole Jacobians.
    """
    return str(error).partition("\nassert ")[0].partition("\n\nThe above quantities")[0]


def name_of(part: Any) -> str:
    """A part in one short line: its repr, or its class where the repr is an address or too long."""
    text = " ".join(repr(part).split()).replace("( ", "(").replace(" )", ")")
    if " object at 0x" in text or text.startswith("<") or len(text) > 120:
        return str(getattr(part, "__qualname__", f"{type(part).__name__}(...)"))
    return text


class Result(NamedTuple):
    """The outcome of one check.

    Attributes:
        check: its name.
        outcome: "pass", "fail", "not applicable", or "not run" where a check that it needs failed.
        reason: the message of a failure, or why the check does not apply or was not run; empty for
            a pass.
        seconds: duration.
    """

    check: str
    outcome: str
    reason: str
    seconds: float
