"""`@parametrize_with_checks`: a test of one's own suite for every check of every part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hamblocks.protocols import LayerDims
from hamblocks.testing.check import Check, CheckFailed, Options, describe
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.suite import BY_NAME, checks_for, op_implementations, settled
from hamblocks_ops.arguments import wrong

Parts = Sequence[Any] | Mapping[str, Any]


class BoundCheck:
    """A check and the part it is to be run over: call it without arguments.

    Attributes:
        check: the check.
        part: the part.
        options: what the part is run with.
        called: how messages call the part.
    """

    def __init__(self, check: Check, part: Any, options: Options, called: str) -> None:
        self.check, self.part, self.options, self.called = check, part, options, called

    def __call__(self, *, profile: str | None = None, seed: int | None = None) -> None:
        """Runs the check with the profile and the seed that pytest was told, or these.

        Raises:
            CheckFailed: the law does not hold.
        """
        from hamblocks.testing import plugin

        seed = plugin.chosen_seed.get() if seed is None else seed
        self.check(self.part, options=self.options, profile=profile, seed=seed, called=self.called)

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
    layers: Parts = (),
    ops: Sequence[Any] = (),
    expected_failures: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
    dims: LayerDims | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Any:
    """Decorates a test with an argument `check`, to be called: one test per part and check that applies to it.

        @parametrize_with_checks(gates=[MyGate()], expected_failures={"check_gate_is_causal": "looks one token ahead"})
        def test_parts(check):
            check()

    Args:
        gates: parts, not built yet, in a list or by the names that test ids shall have; they are copied, never
            changed.
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

    kinds: dict[str, Parts] = {
        "gate": gates,
        "selector": selectors,
        "memory": memories,
        "controller": controllers,
        "attention": attentions,
        "combiner": combiners,
        "layer": layers,
        "op": [one for op in ops for one in op_implementations(op)],
    }
    found, expected_of_some = [], set()
    for kind, parts in kinds.items():
        for name, part in _named(parts).items():
            expected = dict(
                (expected_failures(part) if callable(expected_failures) else expected_failures)
                or {}
            )
            options = settled(kind, part, Options(dims, tuple(dtypes)))
            for check in checks_for(kind):
                reason = check.why_not(part, options)
                if check.name in expected:
                    expected_of_some.add(check.name)
                    if reason is not None:
                        raise wrong(
                            "expected_failures",
                            "checks that apply",
                            f"{check.name} for {name}: {reason}",
                        )
                if reason is not None:
                    continue
                marks = [pytest.mark.hamblocks_slow] if check.slow else []
                if check.name in expected:
                    marks.append(
                        pytest.mark.xfail(
                            raises=CheckFailed, strict=True, reason=expected[check.name]
                        )
                    )
                found.append(
                    pytest.param(
                        BoundCheck(check, part, options, name),
                        id=f"{name}-{check.name}",
                        marks=marks,
                    )
                )
    if not found:
        raise wrong("parts", "at least one", "none")
    if not callable(expected_failures):
        for name in set(expected_failures or ()) - expected_of_some:
            known = "" if name in BY_NAME else f" (known: {', '.join(sorted(BY_NAME))})"
            raise wrong("expected_failures", "names of checks of these parts" + known, repr(name))
    return pytest.mark.parametrize("check", found)


def _named(parts: Parts) -> dict[str, Any]:
    """Parts by name: their own description, with a number behind it where two have the same."""
    if isinstance(parts, Mapping):
        return dict(parts)
    named: dict[str, Any] = {}
    for part in parts:
        name = own = describe(part)
        number = 1
        while name in named:
            number += 1
            name = f"{own}#{number}"
        named[name] = part
    return named
