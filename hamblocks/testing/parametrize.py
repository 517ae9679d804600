"""`@parametrize_with_checks`: a test of one's own suite for every check of every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hamblocks.protocols import Dims
from hamblocks.testing.check import Check, CheckFailed, Options, describe
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.suite import BY_NAME, checks_for, op_implementations, settled
from hamblocks_ops.arguments import wrong


class BoundCheck:
    """A check and the part it is to be run over: call it without arguments.

    Attributes:
        check: the check.
        part: the part.
        options: what the part is run with.
    """

    def __init__(self, check: Check, part: Any, options: Options) -> None:
        self.check, self.part, self.options = check, part, options

    def __call__(self, *, profile: str | None = None, seed: int | None = None) -> None:
        """Runs the check with the profile and the seed that pytest was told, or these.

        Raises:
            CheckFailed: the law does not hold.
        """
        from hamblocks.testing import plugin

        seed = plugin.chosen_seed.get() if seed is None else seed
        self.check(self.part, options=self.options, profile=profile, seed=seed)

    def __repr__(self) -> str:
        return f"{describe(self.part)}-{self.check.name}"


def parametrize_with_checks(
    *,
    gates: Sequence[Any] = (),
    selectors: Sequence[Any] = (),
    memories: Sequence[Any] = (),
    controllers: Sequence[Any] = (),
    attentions: Sequence[Any] = (),
    combiners: Sequence[Any] = (),
    layers: Sequence[Any] = (),
    ops: Sequence[Any] = (),
    expected_failures: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
    dims: Dims | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Any:
    """Decorates a test with an argument `check`, to be called: one test per part and check that applies to it.

        @parametrize_with_checks(gates=[MyGate()], expected_failures={"check_gate_is_causal": "looks one token ahead"})
        def test_parts(check):
            check()

    Args:
        gates: parts, not built yet; they are copied, never changed. So are all below.
        selectors: as above.
        memories: as above.
        controllers: as above.
        attentions: as above.
        combiners: as above.
        layers: whole layers.
        ops: ops of `hamblocks.ops`, which give all their implementations, and `OpImplementation`s.
        expected_failures: names of checks that fail, with the reason; or a function of the part that gives them. An
            expected failure that passes is an error, and so is one that does not apply.
        dims: sizes to run the parts with; None: drawn.
        dtypes: floating dtypes that the parts compute in, the widest first.

    Raises:
        ValueError: no part, or an expected failure that names no check of these parts.
    """
    import pytest

    parts = [
        ("gate", gates),
        ("selector", selectors),
        ("memory", memories),
        ("controller", controllers),
        ("attention", attentions),
        ("combiner", combiners),
        ("layer", layers),
        ("op", [one for op in ops for one in op_implementations(op)]),
    ]
    found, expected_of_some = [], set()
    taken: dict[str, int] = {}
    for kind, given in parts:
        for part in given:
            expected = dict((expected_failures(part) if callable(expected_failures) else expected_failures) or {})
            options = settled(kind, part, Options(dims, tuple(dtypes)))
            name = describe(part)[:60]
            taken[name] = taken.get(name, 0) + 1
            name += f"#{taken[name]}" if taken[name] > 1 else ""
            for check in checks_for(kind):
                reason = check.why_not(part, options)
                if check.name in expected:
                    expected_of_some.add(check.name)
                    if reason is not None:
                        raise wrong("expected_failures", "checks that apply", f"{check.name} for {name}: {reason}")
                if reason is not None:
                    continue
                marks = [pytest.mark.hamblocks_slow] if check.slow else []
                if check.name in expected:
                    marks.append(pytest.mark.xfail(raises=CheckFailed, strict=True, reason=expected[check.name]))
                found.append(pytest.param(BoundCheck(check, part, options), id=f"{name}-{check.name}", marks=marks))
    if not found:
        raise wrong("parts", "at least one", "none")
    if not callable(expected_failures):
        for name in set(expected_failures or ()) - expected_of_some:
            known = "" if name in BY_NAME else f" (known: {', '.join(sorted(BY_NAME))})"
            raise wrong("expected_failures", "names of checks of these parts" + known, repr(name))
    return pytest.mark.parametrize("check", found)
