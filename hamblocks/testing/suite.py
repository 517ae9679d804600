"""All checks by kind, and the functions that run every check of a part."""

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
    query_gates,
    selectors,
)
from hamblocks.testing.ops import OpImplementation
from hamblocks.testing.order import blocker, not_run, ordered
from hamblocks.testing.settings import Profile
from hamblocks_ops import implementations
from hamblocks_ops.arguments import wrong

CHECKS: dict[str, Sequence[Check]] = {
    "gate": ordered(gates.CHECKS),
    "selector": ordered(selectors.CHECKS),
    "memory": ordered(memories.CHECKS),
    "controller": ordered(controllers.CHECKS),
    "attention": ordered(attentions.CHECKS),
    "combiner": ordered(combiners.CHECKS),
    "query_gate": ordered(query_gates.CHECKS),
    "op": ordered(ops.CHECKS),
    "layer": ordered(layers.CHECKS),
}
"""Every check by the kind of part that it is for, in the order in which they run."""

BY_NAME = {check.name: check for checks in CHECKS.values() for check in checks}
"""Every check by its name."""


def checks_for(kind: str, only: Sequence[str] | None = None) -> list[Check]:
    """The checks of a kind, or those of them that `only` names.

    Raises:
        ValueError: there is no such kind, or it has no check of such a name.
    """
    if kind not in CHECKS:
        raise wrong("kind", "one of " + ", ".join(CHECKS), repr(kind))
    checks = list(CHECKS[kind])
    known = {check.name for check in checks}
    for name in only or ():
        if name not in known:
            expected = f"names of checks of a {kind}: {', '.join(sorted(known))}"
            raise wrong("only", expected, repr(name))
    return [check for check in checks if only is None or check.name in only]


def settled(kind: str, part: Any, options: Options) -> Options:
    """The options; for a layer with its own sizes, where the options have none.

    Raises:
        ValueError: neither a layer nor the options have sizes.
    """
    if kind != "layer" or options.dims is not None:
        return options
    dims = getattr(part, "dims", None)
    if dims is None:
        expected = (
            "the sizes of a layer that has no attribute dims, for example LayerDims(64, 4, 4, 16)"
        )
        raise wrong("dims", expected, "None")
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
    """Runs the checks of a kind over a part, one after the other, and yields their results.

    A check that needs one that failed is not run: its outcome is "not run", and its reason names
    the check that failed.

    Args:
        kind: gate, selector, memory, controller, attention, combiner, query_gate, op or layer.
        part: the part, not built yet; the checks run copies of it. For "op": an
            `OpImplementation`.
        only: names of checks; None: all of the kind.
        dims: sizes to run it with; None: its own for a layer, else several are drawn.
        dtypes: floating dtypes that it computes in, the widest first.
        profile: "dev", "ci" or "nightly"; None: --hamblocks-profile where pytest was given it,
            else "ci" where the environment variable CI is set, else "dev".
        seed: draw the cases of this seed; None: the profile decides.
        shrink: whether to look for a smaller case that fails too.
        called: the expression that makes the part, for messages; None: its repr.

    Raises:
        ValueError: there is no such kind or check.
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
    """As `run_checks`; with `raises`, it raises the first failure instead of yielding it."""
    __tracebackhide__ = True
    checks = checks_for(kind, only)
    options = settled(kind, part, Options(dims, tuple(dtypes)))
    failed: set[str] = set()
    for check in checks:
        begin, outcome, reason = time.perf_counter(), "pass", ""
        needed = blocker(check, failed)
        try:
            if needed is None or check.why_not(part, options) is not None:
                check(part, options=options, **given)
            else:
                outcome, reason = "not run", not_run(needed)
        except NotApplicableError as error:
            outcome, reason = "not applicable", error.reason
        except CheckFailed as error:
            if raises:
                raise
            failed.add(check.name)
            outcome, reason = "fail", str(error)
        yield Result(check.name, outcome, reason, time.perf_counter() - begin)


def _for(kind: str) -> Callable[..., list[Result]]:
    def check(part: Any, **given: Any) -> list[Result]:
        __tracebackhide__ = True
        return list(_run(kind, part, raises=True, **given))

    check.__name__ = check.__qualname__ = f"check_{kind}"
    check.__doc__ = f"""Runs every check of a {kind}; keyword arguments as in `run_checks`.

    Returns:
        The result of each check; one that does not apply gives the reason.

    Raises:
        CheckFailed: at the first check that fails. The message names the check, what was seen, and
            a line that repeats it.
    """
    return check


check_gate = _for("gate")
"""Runs every check of a gate: `check_gate(part, **given)`, see `run_checks`."""
check_selector = _for("selector")
"""Runs every check of a selector: `check_selector(part, **given)`, see `run_checks`."""
check_memory = _for("memory")
"""Runs every check of a memory: `check_memory(part, **given)`, see `run_checks`."""
check_controller = _for("controller")
"""Runs every check of a controller: `check_controller(part, **given)`, see `run_checks`."""
check_attention = _for("attention")
"""Runs every check of an attention: `check_attention(part, **given)`, see `run_checks`."""
check_combiner = _for("combiner")
"""Runs every check of a combiner: `check_combiner(part, **given)`, see `run_checks`."""
check_query_gate = _for("query_gate")
"""Runs every check of a query gate: `check_query_gate(part, **given)`, see `run_checks`."""
check_layer = _for("layer")
"""Runs every check of a layer: `check_layer(part, **given)`, see `run_checks`."""


def check_op(
    run: Callable[..., Any], like: Callable[..., Any] | None = None, **given: Any
) -> list[Result]:
    """Runs every check of an op over an implementation of it.

    Args:
        run: a callable with the signature of the op `like`, without `impl`; or an op of
            `hamblocks.ops`, which stands for all its implementations; or an `OpImplementation`.
        like: the op of `hamblocks.ops` that `run` implements.
        given: keyword arguments of `run_checks`.

    Returns:
        The result of each check.

    Raises:
        CheckFailed: at the first check that fails.
        ValueError: `like` is no op of `hamblocks.ops`.
    """
    __tracebackhide__ = True
    return [
        result
        for part in op_implementations(run, like)
        for result in _run("op", part, raises=True, **given)
    ]


def op_implementations(
    run: Any, like: Callable[..., Any] | None = None, only: Sequence[str] = ()
) -> list[OpImplementation]:
    """The implementations to check: those of an op of `hamblocks.ops`, or one callable.

    Args:
        run: as in `check_op`.
        like: as in `check_op`.
        only: names of the implementations of an op of `hamblocks.ops`; empty: all.
    """
    if isinstance(run, OpImplementation):
        return [run]
    if like is not None:
        return [OpImplementation(like, run)]
    names = implementations(run) or ("auto",)
    return [OpImplementation(run, impl=name) for name in names if not only or name in only]
