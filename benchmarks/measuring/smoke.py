"""Every implementation of every op once, forward and backward, against the reference in float64.

One shape for each op, and one query for attention. The part ends with a profile of one call, for
what the device runs and in which order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hamblocks.ops import (
    compact,
    gated_delta_rule,
    implementations,
    paged_attention,
    selected_attention,
    surprise,
)
from hamblocks.testing import (
    AttentionInputs,
    DeltaRuleInputs,
    OpImplementation,
    PagedInputs,
    RowInputs,
)
from hamblocks.testing.kinds.op_cases import refusal
from measuring import floors
from measuring.attend import scattered, selected
from measuring.checks import WrongResultError, within
from measuring.clock import Clock, NotHereError, reason
from measuring.costs import launched, traced
from measuring.sizes import Sizes

ERROR_FACTOR = 4
"""Allowed error, in errors of the reference in the same dtype: sums of another order drift apart."""
LAST = ("flex-compact", "flex")
"""Implementations that are compiled for every call: they come when all others have run."""
TRACE_FRACTION = 0.25


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Tokens of a sequence."""
    return (sizes.smoke_tokens,)


def cases(tokens: int, sizes: Sizes) -> list[tuple[Any, str, Any]]:
    """Op, what is special about the call, and its inputs."""
    dim, dtype = sizes.head_dim, sizes.dtype
    drawn: list[tuple[Any, str, Any]] = [
        (
            selected_attention,
            "grouped queries",
            AttentionInputs(tokens=tokens, dim=dim, group=4, kv_heads=1, policy="window"),
        ),
        (
            selected_attention,
            "one query",
            AttentionInputs(tokens=1, cache=tokens, dim=dim, policy="all"),
        ),
        (
            gated_delta_rule,
            "a sequence",
            DeltaRuleInputs(tokens=tokens, heads=2, key_dim=dim, value_dim=dim),
        ),
        (surprise, "a sequence", RowInputs(tokens=tokens, dim=dim)),
        (
            paged_attention,
            "one query",
            PagedInputs(width=tokens // 16, slabs=((tokens // 8, 16),), dim=dim, policy="all"),
        ),
    ]
    return [(op, special, replace(case, dtype=dtype)) for op, special, case in drawn]


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """What was compared of every call, or why it was not; then the profile."""
    calls = [
        (op, special, case, impl)
        for op, special, case in cases(tokens, sizes)
        for impl in implementations(op)
        if impl != "reference"
    ]
    for op, special, case, impl in sorted(calls, key=lambda call: call[3] in LAST):
        names = {"part": "smoke", "tokens": tokens, "case": f"{op.__name__} {impl}"}
        one: dict[str, Any] = {**names, "variant": special}
        part = OpImplementation(op, impl=impl, device=sizes.device)
        began = time.perf_counter()
        one |= attempt(lambda part=part, case=case: once(part, case, clock))  # type: ignore[misc]
        one["took"] = time.perf_counter() - began
        clock.say(f"{one['case']}, {special}: {one.get('reason', 'right')}")
        clock.release()
        yield one
    for impl in implementations(compact)[:-1]:
        names = {"part": "smoke", "tokens": tokens, "case": f"compact {impl}"}
        yield names | attempt(lambda impl=impl: same_lists(tokens, sizes, impl))  # type: ignore[misc]
    names = {"part": "smoke", "tokens": tokens, "case": "profile"}
    yield names | attempt(lambda: profiled(tokens, sizes))


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call returns, or the reason why it failed."""
    try:
        return call()
    except Exception as error:
        return {"reason": reason(error)}


def once(part: OpImplementation, case: Any, clock: Clock) -> dict[str, Any]:
    """What was compared, or why the implementation refuses the call."""
    clock.in_time()
    refused = refusal(part, case)
    return {"reason": refused} if refused else {"checked": compare(part.problem(case))}


def compare(problem: Any) -> dict[str, Any]:
    """Compares results and gradients, each with the error of the reference in the same dtype.

    Raises:
        WrongResultError: one of them is wrong.
    """
    got, others = problem.run("it"), [problem.run("reference")]
    if problem.yardstick != "reference":  # products in a narrower dtype, say
        others.append(problem._moved(1))
    errors, allowed = {}, {}
    for name, exact in problem.run("reference", dtype=torch.float64).items():
        finite = exact.isfinite()
        size = float(exact[finite].norm())
        error, *own = (float((x[name].double() - exact)[finite].norm()) for x in (got, *others))
        same = torch.equal(got[name].isfinite(), finite)
        eps = torch.finfo(got[name].dtype).eps if got[name].is_floating_point() else 0.0
        errors[name] = error if same else float("nan")
        allowed[name] = ERROR_FACTOR * max(own) + eps * size
    return within("the reference in float64", errors, allowed)


def same_lists(tokens: int, sizes: Sizes, impl: str) -> dict[str, Any]:
    """Compares the lists of `compact` with those of its implementation in plain torch.

    Raises:
        WrongResultError: they do not.
    """
    evict_at = scattered(TRACE_FRACTION, tokens, sizes.heads, sizes.device)
    trusted = implementations(compact)[-1]
    got, exact = (compact(evict_at, impl=one)._asdict() for one in (impl, trusted))
    for name, x in exact.items():
        if isinstance(x, Tensor) and not torch.equal(got[name], x):
            raise WrongResultError(f"{name}: not that of impl={trusted!r}")
    return {"checked": {"against": trusted, "equal": list(exact)}}


def profiled(tokens: int, sizes: Sizes) -> dict[str, Any]:
    """What the device runs for one forward and backward pass of selected attention.

    With `sizes.traces` the trace is written there as smoke-trace.json, for chrome://tracing.
    """
    if not sizes.gpu:
        raise NotHereError("the profile is that of a GPU")
    shape = 1, tokens, sizes.heads, sizes.head_dim
    given = [
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype).requires_grad_()
        for _ in range(3)
    ]
    attend = selected(scattered(TRACE_FRACTION, tokens, sizes.heads, sizes.device), "triton")

    def call() -> object:
        out = attend(*given)
        return torch.autograd.grad(out, given, torch.ones_like(out))

    call()  # compiled and warm
    watched = traced(call)
    if sizes.traces is not None:
        watched.export_chrome_trace(str(sizes.traces / "smoke-trace.json"))
    return {"launches": dict(launched(watched))}
