"""`@parametrize_with_checks`: one pytest test for every check of every part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from hamblocks.protocols import LayerDims
from hamblocks.testing.check import Check, CheckFailed, Options, name_of
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.order import needs, not_run
from hamblocks.testing.settings import chosen
from hamblocks.testing.suite import BY_NAME, checks_for, op_implementations, settled
from hamblocks_ops.arguments import wrong

Parts = Sequence[Any] | Mapping[str, Any]
Expected = Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None


@dataclass(frozen=True)
class PartChecks:
    """What the checks of one part share.

    Attributes:
        kind: of the part.
        part: the part.
        called: how test ids and messages name it.
        options: what it is run with.
        expected: names of the checks that are expected to fail, with the reasons.
        selected: names of the checks that this pytest run has selected, filled in by the plugin.
        passed: whether the checks that have run passed, by name.
    """

    kind: str
    part: Any
    called: str
    options: Options
    expected: Mapping[str, str]
    selected: set[str] = field(default_factory=set)
    passed: dict[str, bool] = field(default_factory=dict)

    def run(self, check: Check, **given: Any) -> None:
        """Runs a check, and records whether it passed."""
        __tracebackhide__ = True
        try:
            check(self.part, options=self.options, called=self.called, **given)
        except CheckFailed:
            self.passed[check.name] = False
            raise
        self.passed[check.name] = True

    def fails(self, check: Check, **given: Any) -> bool:
        """Whether a check fails; it is run unless that is known."""
        if check.name not in self.passed:
            try:
                self.run(check, **given)
            except CheckFailed:
                return True
        return not self.passed[check.name]


class BoundCheck:
    """A check together with its part: call it without arguments to run it.

    If a check that this one needs fails, calling it skips the test and names that check, which
    fails in a test of its own. This holds only where that test is part of the same pytest run and
    is not expected to fail; else nobody would see a failure, and this check is run and fails.

    Attributes:
        check: the check.
        part: the part.
        options: what the part is run with.
        called: how messages name the part.
        of_part: what it shares with the other checks of the part.
    """

    def __init__(self, check: Check, of_part: PartChecks) -> None:
        self.check, self.of_part = check, of_part
        self.part, self.options, self.called = of_part.part, of_part.options, of_part.called

    def __call__(self, *, profile: str | None = None, seed: int | None = None) -> None:
        """Runs the check, by default with the profile and the seed that pytest was given.

        Raises:
            CheckFailed: the law does not hold.
        """
        __tracebackhide__ = True
        given = {"profile": profile, "seed": chosen().seed if seed is None else seed}
        for needed in self._needed():
            if not self.of_part.passed.get(needed.name, True):
                pytest.skip(not_run(needed.name))
        try:
            self.of_part.run(self.check, **given)
        except CheckFailed:
            # Under pytest-xdist or pytest-randomly the checks that this one needs may not have run.
            for needed in self._needed():
                if self.of_part.fails(needed, **given):
                    pytest.skip(not_run(needed.name))
            raise

    def _needed(self) -> Iterator[Check]:
        """The checks that this one needs and whose failures this pytest run shows."""
        of_part = self.of_part
        if self.check.name in of_part.expected:
            return
        for name in needs(self.check):
            check = BY_NAME.get(name)
            if check is None or name not in of_part.selected or name in of_part.expected:
                continue
            if check.why_not(self.part, self.options) is None:
                yield check

    def __repr__(self) -> str:
        return f"{self.called}-{self.check.name}"


def parametrize_with_checks(
    *,
    gates: Parts = (),
    selectors: Parts = (),
    memories: Parts = (),
    controllers: Parts = (),
    attentions: Parts = (),
    combiners: Parts = (),
    query_gates: Parts = (),
    layers: Parts = (),
    ops: Sequence[Any] = (),
    expected_failures: Expected = None,
    dims: LayerDims | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Any:
    """Parametrizes a test over all checks that apply to the parts, as its argument `check`.

        @parametrize_with_checks(gates=[MyGate()])
        def test_parts(check):
            check()

    A check whose test fails makes the checks that need it skip: a part that fails for one reason
    fails one test.

    Args:
        gates: parts that are not built yet, in a list, or in a dict by the names for test ids. The
            checks run copies of them.
        selectors: as `gates`.
        memories: as `gates`.
        controllers: as `gates`.
        attentions: as `gates`.
        combiners: as `gates`.
        query_gates: as `gates`.
        layers: whole layers.
        ops: ops of `hamblocks.ops`, each of which stands for all its implementations, and
            `OpImplementation`s.
        expected_failures: names of checks that fail, with the reasons; or a function that returns
            them for a part. An expected failure that passes is an error, and so is one that does
            not apply. A check that needs an expected failure is run all the same.
        dims: sizes to run the parts with; None: several are drawn.
        dtypes: floating dtypes that the parts compute in, the widest first.

    Raises:
        ValueError: there is no part, or an expected failure names no check of these parts.
    """
    kinds: dict[str, Parts] = {
        "gate": gates,
        "selector": selectors,
        "memory": memories,
        "controller": controllers,
        "attention": attentions,
        "combiner": combiners,
        "query_gate": query_gates,
        "layer": layers,
        "op": [one for op in ops for one in op_implementations(op)],
    }
    options = Options(dims, tuple(dtypes))
    of_parts = [
        PartChecks(kind, part, name, settled(kind, part, options), _of(expected_failures, part))
        for kind, parts in kinds.items()
        for name, part in _named(parts).items()
    ]
    if not of_parts:
        raise wrong("parts", "at least one", "none")
    if not callable(expected_failures):
        _refuse_unknown(expected_failures or {}, of_parts)
    return pytest.mark.parametrize("check", [test for one in of_parts for test in _tests(one)])


def _of(expected_failures: Expected, part: Any) -> dict[str, str]:
    given = expected_failures(part) if callable(expected_failures) else expected_failures
    return dict(given or {})


def _refuse_unknown(expected_failures: Mapping[str, str], of_parts: Sequence[PartChecks]) -> None:
    names = {check.name for one in of_parts for check in checks_for(one.kind)}
    for name in expected_failures:
        if name not in names:
            known = "" if name in BY_NAME else f" (known: {', '.join(sorted(BY_NAME))})"
            raise wrong("expected_failures", "names of checks of these parts" + known, repr(name))


def _tests(of_part: PartChecks) -> Iterator[Any]:
    """One `pytest.param` for every check that applies to a part."""
    for check in checks_for(of_part.kind):
        reason = check.why_not(of_part.part, of_part.options)
        expected = of_part.expected.get(check.name)
        if reason is not None:
            if expected is not None:
                got = f"{check.name} for {of_part.called}: {reason}"
                raise wrong("expected_failures", "checks that apply", got)
            continue
        marks = [pytest.mark.hamblocks_slow] if check.slow else []
        if expected is not None:
            marks.append(pytest.mark.xfail(raises=CheckFailed, strict=True, reason=expected))
        test_id = f"{of_part.called}-{check.name}"
        yield pytest.param(BoundCheck(check, of_part), id=test_id, marks=marks)


def _named(parts: Parts) -> dict[str, Any]:
    """Parts by their names; parts of the same name are numbered: "TopK(3)", "TopK(3)#2"."""
    if isinstance(parts, Mapping):
        return dict(parts)
    named: dict[str, Any] = {}
    for part in parts:
        name = own = name_of(part)
        number = 1
        while name in named:
            number += 1
            name = f"{own}#{number}"
        named[name] = part
    return named
