"""All checks by kind, and the ways to run all those of a part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hamblocks.protocols import LayerDims
from hamblocks.testing.check import Check, CheckFailed, NotApplicableError, Options, Result
from hamblocks.testing.inputs.draw import DTYPES
from hamblocks.testing.kinds import (
    attentions,
    combiners,
    controllers,
    gates,
    layers,
    memories,
    ops,
    selectors,
)
from hamblocks.testing.ops import OpImplementation
from hamblocks.testing.profiles import Profile
from hamblocks_ops import implementations
from hamblocks_ops.arguments import wrong

CHECKS: dict[str, Sequence[Check]] = {
    "gate": gates.CHECKS,
    "selector": selectors.CHECKS,
    "memory": memories.CHECKS,
    "controller": controllers.CHECKS,
    "attention": attentions.CHECKS,
    "combiner": combiners.CHECKS,
    "op": ops.CHECKS,
    "layer": layers.CHECKS,
}
"""Every check, by the kind of part that it is for."""

BY_NAME = {check.name: check for checks in CHECKS.values() for check in checks}


def checks_for(kind: str, only: Sequence[str] | None = None) -> list[Check]:
    """The checks of a kind, those named by `only`.

    Raises:
        ValueError: no such kind, or it has no check of that name.
    """
    if kind not in CHECKS:
        raise wrong("kind", "one of " + ", ".join(CHECKS), repr(kind))
    checks = list(CHECKS[kind])
    known = {check.name for check in checks}
    for name in only or ():
        if name not in known:
            raise wrong(
                "only", f"names of checks of a {kind}: {', '.join(sorted(known))}", repr(name)
            )
    return [check for check in checks if only is None or check.name in only]


def settled(kind: str, part: Any, options: Options) -> Options:
    """Options with the sizes that a layer has of its own.

    Raises:
        ValueError: a layer that does not say how wide it is, and options that do not either.
    """
    if kind != "layer" or options.dims is not None:
        return options
    dims = getattr(part, "dims", None)
    if dims is None:
        raise wrong(
            "dims",
            "the sizes of a layer that has no attribute dims, e.g. LayerDims(64, 4, 4, 16)",
            "None",
        )
    return Options(LayerDims(*dims), options.dtypes)


def run_checks(
    kind: str,
    part: Any,
    *,
    only: Sequence[str] | None = None,
    dims: LayerDims | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    profile: str | Profile | None = None,
    seed: int | None = None,
    shrink: bool = True,
    called: str | None = None,
) -> Iterator[Result]:
    """Runs the checks of a kind over a part, one after the other, and tells how each went.

    Args:
        kind: gate, selector, memory, controller, attention, combiner, op or layer.
        part: the part, not built yet; it is copied, never changed. For "op": an `OpImplementation`.
        only: names of checks; None: all of the kind.
        dims: sizes to run it with; None: drawn, those of its own for a layer.
        dtypes: floating dtypes that it computes in, the widest first.
        profile: "dev", "ci" or "nightly"; None: what pytest was told, else ci where the environment says CI, else dev.
        seed: draws other cases for every seed.
        shrink: look for a smaller failing case.
        called: expression that makes the part, for messages; None: its repr.

    Raises:
        ValueError: no such kind or check.
    """
    return _run(
        kind,
        part,
        raises=False,
        only=only,
        dims=dims,
        dtypes=dtypes,
        profile=profile,
        seed=seed,
        shrink=shrink,
        called=called,
    )


def _run(
    kind: str,
    part: Any,
    *,
    raises: bool,
    only: Sequence[str] | None = None,
    dims: LayerDims | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    **given: Any,
) -> Iterator[Result]:
    """As `run_checks`; with `raises` it ends at the first failure by raising it."""
    checks = checks_for(kind, only)
    options = settled(kind, part, Options(dims, tuple(dtypes)))
    for check in checks:
        begin, outcome, reason = time.perf_counter(), "pass", ""
        try:
            check(part, options=options, **given)
        except NotApplicableError as error:
            outcome, reason = "not applicable", error.reason
        except CheckFailed as error:
            if raises:
                raise
            outcome, reason = "fail", str(error)
        yield Result(check.name, outcome, reason, time.perf_counter() - begin)


def _for(kind: str) -> Callable[..., list[Result]]:
    def check(part: Any, **given: Any) -> list[Result]:
        return list(_run(kind, part, raises=True, **given))

    check.__name__ = check.__qualname__ = f"check_{kind}"
    check.__doc__ = f"""Runs every check of a {kind}; keyword arguments as in `run_checks`.

    Returns:
        How each check went: those that do not apply say why.

    Raises:
        CheckFailed: at the first check that fails; it names the check, what was seen, and one line that shows it again.
    """
    return check


check_gate = _for("gate")
"""Runs every check of a gate: `check_gate(part, **given)`, with the keyword arguments of `run_checks`."""
check_selector = _for("selector")
"""Runs every check of a selector: `check_selector(part, **given)`, with the keyword arguments of `run_checks`."""
check_memory = _for("memory")
"""Runs every check of a memory: `check_memory(part, **given)`, with the keyword arguments of `run_checks`."""
check_controller = _for("controller")
"""Runs every check of a controller: `check_controller(part, **given)`, with the keyword arguments of `run_checks`."""
check_attention = _for("attention")
"""Runs every check of an attention: `check_attention(part, **given)`, with the keyword arguments of `run_checks`."""
check_combiner = _for("combiner")
"""Runs every check of a combiner: `check_combiner(part, **given)`, with the keyword arguments of `run_checks`."""
check_layer = _for("layer")
"""Runs every check of a layer: `check_layer(part, **given)`, with the keyword arguments of `run_checks`."""


def check_op(
    run: Callable[..., Any], like: Callable[..., Any] | None = None, **given: Any
) -> list[Result]:
    """Runs every check of an op over an implementation of it.

    Args:
        run: a callable with the signature of the op it is `like`, without `impl`; or an op of `hamblocks.ops`, or an
            `OpImplementation`.
        like: the op of `hamblocks.ops` that `run` implements.
        given: keyword arguments of `run_checks`.

    Returns:
        How each check went.

    Raises:
        CheckFailed: at the first check that fails.
        ValueError: `like` is no op of ours.
    """
    return [
        result
        for part in op_implementations(run, like)
        for result in _run("op", part, raises=True, **given)
    ]


def op_implementations(
    run: Any, like: Callable[..., Any] | None = None, only: Sequence[str] = ()
) -> list[OpImplementation]:
    """An op of ours as all its implementations, or those named by `only`; a callable of one's own as that alone."""
    if isinstance(run, OpImplementation):
        return [run]
    if like is not None:
        return [OpImplementation(like, run)]
    names = implementations(run) or ("auto",)
    return [OpImplementation(run, impl=name) for name in names if not only or name in only]
