"""What a check is, how it is run over drawn cases, and what it says when it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from hamblocks.protocols import LayerDims
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.profiles import Profile, current


class CheckFailed(AssertionError):  # noqa: N818 - as pytest names its own
    """A part did not pass a check. The message says which, what was seen, and one line that shows it again."""


class NotApplicableError(ValueError):
    """A check was called with a part that it says nothing about.

    Attributes:
        reason: why it does not.
    """

    def __init__(self, check: str, part: str, reason: str) -> None:
        super().__init__(f"part: expected one that {check} applies to, got {part}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Options:
    """What a part can be run with.

    Attributes:
        dims: sizes of the layer that the part is made for; None: drawn, as a part that asks for none of its own takes
            any.
        dtypes: floating dtypes that the part computes in. Laws that compare two results use the first.
    """

    dims: LayerDims | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES


Applies = Callable[[Any, Options], "str | None"]
Body = Callable[[Any, Any, Options], None]


def always(_part: object, _options: Options) -> None:
    """For checks that every part of their kind must pass."""
    return


@dataclass(frozen=True)
class Check:
    """One named law for one kind of part. Call it with a part to run it.

    Attributes:
        name: begins with "check_" and the kind.
        kind: gate, selector, memory, controller, attention, combiner, op or layer.
        body: `body(part, case, options)` raises where the law does not hold.
        cases: strategy of the drawn cases; None: the edges alone.
        edges: cases that are run first, whatever is drawn.
        applies: why the check says nothing about a part, or None where it does.
        share: the number of drawn cases is that of the profile divided by this.
        slow: takes seconds.
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
    def purpose(self) -> str:
        """What the check checks, one line."""
        return (self.body.__doc__ or "").strip().splitlines()[0]

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
            part: the part; it is copied, never changed.
            case: run this one case; None: the edges, then as many drawn cases as the profile says.
            options: what the part can be run with.
            profile: "dev", "ci" or "nightly"; None: what pytest was told, else ci under CI, else dev.
            seed: draws other cases for every seed; None: the profile decides whether cases differ from run to run.
            shrink: look for a smaller failing case.
            edges: run the edges too, which are the same for every seed.
            called: expression that makes the part, for the message; None: its repr.

        Raises:
            CheckFailed: the law does not hold.
            NotApplicableError: the check does not apply to this part; it is a ValueError.
        """
        options = options or Options()
        reason = self.why_not(part, options)
        if reason is not None:
            raise NotApplicableError(self.name, describe(part), reason)
        called = called or describe(part)
        if case is not None:
            self._fail_with(self._once(part, case, options), called, options)
            return
        for edge in self.edges(options) if edges else ():
            self._fail_with(self._once(part, edge, options), called, options)
        if self.cases is None:
            return
        profile = current(profile)
        drawn = _drawn(
            lambda one: self.body(copy.deepcopy(part), one, options),
            self.cases(options),
            examples=max(profile.examples // self.share, 2),
            derandomize=profile.derandomize,
            seed=seed,
            shrink=shrink,
        )
        self._fail_with(drawn, called, options)

    def why_not(self, part: Any, options: Options | None = None) -> str | None:
        """Why the check does not apply to a part; None where it does, also where the part fails before that shows."""
        try:
            return self.applies(copy.deepcopy(part), options or Options())
        except Exception:
            return None

    def _once(self, part: Any, case: Any, options: Options) -> tuple[Any, Exception] | None:
        try:
            self.body(copy.deepcopy(part), case, options)
        except Exception as error:
            return case, error
        return None

    def _fail_with(
        self, failure: tuple[Any, Exception] | None, called: str, options: Options
    ) -> None:
        if failure is None:
            return
        case, error = failure
        what = (
            plain(error)
            if isinstance(error, AssertionError) and str(error)
            else f"{type(error).__name__}: {error}"
        )
        more = "" if options == Options() else f", options={options!r}"
        raise CheckFailed(
            f"{self.name}: {called}\n  {what}\n  law: {self.purpose}\n  again: {self.name}({called}, {case!r}{more})"
        ) from error

    def __repr__(self) -> str:
        return self.name


def _drawn(
    body: Callable[[Any], None],
    cases: st.SearchStrategy[Any],
    *,
    examples: int,
    derandomize: bool,
    seed: int | None,
    shrink: bool,
) -> tuple[Any, Exception] | None:
    """The smallest failing case that hypothesis finds, with its error."""
    failing: list[tuple[Any, Exception]] = []

    def test(case: Any) -> None:
        try:
            body(case)
        except hypothesis.errors.HypothesisException:
            raise
        except Exception as error:
            failing.append((case, error))
            raise

    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=derandomize and seed is None,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )
    run = settings(hypothesis.given(cases)(test))
    if seed is not None:
        run = hypothesis.seed(seed)(run)
    try:
        run()
    except Exception:
        if not failing:
            raise
        return failing[-1]  # hypothesis ends with the smallest
    return None


def plain(error: Exception) -> str:
    """What an assertion says, without the lines that pytest writes behind it and those of whole Jacobians."""
    return str(error).partition("\nassert ")[0].partition("\n\nThe above quantities")[0]


def describe(part: Any) -> str:
    """A part as one short line: its repr, or its class where the repr is an address or a page."""
    text = " ".join(repr(part).split()).replace("( ", "(").replace(" )", ")")
    if " object at 0x" in text or text.startswith("<") or len(text) > 120:
        return str(getattr(part, "__qualname__", f"{type(part).__name__}(...)"))
    return text


class Result(NamedTuple):
    """How one check went.

    Attributes:
        check: its name.
        outcome: "pass", "fail" or "not applicable".
        reason: what failed, with the line that shows it again, or why the check does not apply; empty for a pass.
        seconds: how long it took.
    """

    check: str
    outcome: str
    reason: str
    seconds: float
