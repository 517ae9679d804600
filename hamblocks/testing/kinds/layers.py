"""Checks of whole layers.

A layer is called as `layer(x, state=, cu_seqlens=) -> y, state, stats`, or as `layer(x) -> y`.
Checks of streaming and packing apply to layers that accept `state` and `cu_seqlens`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.layer import HAMLayer
from hamblocks.selectors import Threshold
from hamblocks.testing.budget import assert_bits, assert_same
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import EDGES, SPLIT, cases_of, common, edges_of, exact
from hamblocks.testing.comparing import assert_never_longer, by_token, prefixed
from hamblocks.testing.inputs.draw import borders
from hamblocks.testing.inputs.parts import PartInputs, part_inputs
from hamblocks.testing.kinds.selectors import at, thresholds, why_not_monotone
from hamblocks.testing.subjects import LayerSubject, Results, made
from hamblocks_ops import NEVER


def accepts(part: Any, name: str) -> bool:
    """Whether a layer accepts an argument of that name."""
    call = part.forward if isinstance(part, torch.nn.Module) else part
    parameters = inspect.signature(call).parameters
    return name in parameters or any(
        one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()
    )


def _stores_what_it_decided(part: Any, case: PartInputs, _options: Options) -> None:
    """After every piece, each key/value head stores the tokens that one pass would still keep."""
    subject = LayerSubject(part, case)
    kv_heads = subject.part.dims.num_kv_heads
    with torch.no_grad():
        state, ends = subject.start(case.batch), case.borders
        for begin, end in pairwise(ends):
            _, state = subject.run(by_token(subject.inputs, slice(begin, end)), state)
            known = subject.run(by_token(subject.inputs, slice(0, end)))[0]["evict_at"].expand(
                -1, -1, kv_heads
            )
            if state.cache.sizes is None:
                assert end == 0, f"nothing was decided or stored after {end} tokens"
                continue
            stored, tokens = state.cache.stored(), state.cache.tokens
            for n, head in [(n, h) for n in range(case.batch) for h in range(kv_heads)]:
                alive = (known[n, :, head] > end).nonzero()[:, 0]
                # if the gate has one score for all heads, one stream holds all heads
                stream = head if stored.position.shape[2] > 1 else 0
                there = stored.position[n, :, stream] != NEVER
                position, order = stored.position[n, there, stream].sort()
                until = stored.evict_at[n, there, stream][order]
                where = f"sequence {n}, head {head} after {end} tokens"
                assert position.tolist() == alive.tolist(), (
                    f"{where}: {position.tolist()} stored, {alive.tolist()} kept"
                )
                with prefixed(where):
                    assert_bits({"evict_at": until}, {"evict_at": known[n, alive, head]})
                count = int(tokens[n, head if tokens.shape[1] > 1 else 0])
                assert count == len(alive), f"{where}: {count} counted, {len(alive)} kept"


def _forks_go_on_alone(part: Any, case: PartInputs, _options: Options) -> None:
    """A fork goes on as its state would have, whatever happens to the state."""
    subject = LayerSubject(part, case)
    t = min(case.cuts[0], case.tokens)
    rest = by_token(subject.inputs, slice(t, None))
    other = {"x": 3 - rest["x"]}
    with torch.no_grad():

        def plain() -> Results:
            return subject.run(rest, reached())[0]

        def reached() -> Any:
            return subject.run(by_token(subject.inputs, slice(0, t)), subject.start(case.batch))[1]

        state = reached()
        fork = state.fork()
        subject.run(other, state)
        with prefixed("a fork changed when its state went on with other tokens"):
            assert_same(subject.run(rest, fork)[0], plain(), plain)


def _raising_tau_never_keeps_more(part: Any, case: PartInputs, _options: Options) -> None:
    """A higher threshold ends no lifetime later: scores do not depend on what is stored."""
    subject = LayerSubject(part, case)
    kept = []
    for tau in (-math.inf, 0.3, 0.7, 1.0, math.inf):
        for one in thresholds(subject.part):
            one.set_threshold(tau)
        with torch.no_grad():
            kept.append(subject.run(subject.inputs)[0]["evict_at"])
    assert_never_longer(kept)


def _limits_of_the_threshold(part: Any, case: PartInputs, _options: Options) -> None:
    """At tau = -inf every token is stored for good; at +inf none is, as in a memory alone."""
    subject = LayerSubject(part, case)
    position = case.position[..., None]
    for tau in (-math.inf, math.inf):
        subject.part.selector = at(Threshold(0.0), tau)
        with torch.no_grad():
            results, _ = subject.run(subject.inputs)
        right = (
            torch.full_like(results["evict_at"], NEVER)
            if tau < 0
            else position.expand_as(results["evict_at"])
        )
        with prefixed(f"at tau = {tau}"):
            assert_bits({"evict_at": results["evict_at"]}, {"evict_at": right})

    @torch.no_grad()
    def alone() -> Results:
        return subject.run(subject.inputs)[0]

    attention = subject.part.attention
    del subject.part.attention
    subject.part.attention = _ReadsNothing(attention)
    with prefixed("at tau = +inf the layer gives another result than its memory alone"):
        assert_same(results, alone(), alone)


def _low_precision_streams(part: Any, case: PartInputs, _options: Options) -> None:
    """Decoding token by token gives finite results in the dtype of x, for every dtype."""
    subject = LayerSubject(part, case)
    with torch.no_grad():
        state = subject.start(case.batch)
        for t in range(case.tokens):
            results, state = subject.run(by_token(subject.inputs, slice(t, t + 1)), state)
            assert results["y"].dtype == case.dtype, (
                f"y: {results['y'].dtype}, expected {case.dtype}"
            )
            assert bool(results["y"].isfinite().all()), f"y: not finite at position {t}"


def _refuses_bad_input(part: Any, case: PartInputs, _options: Options) -> None:
    """A bad argument raises a ValueError: its name, what was expected and what came."""
    subject = LayerSubject(part, case)
    x = subject.inputs["x"]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("x", lambda: subject.part(x[..., :-1])),
        ("x", lambda: subject.part(x[0])),
        ("x", lambda: subject.part(x.long())),
    ]
    if accepts(part, "cu_seqlens"):
        whole = x.flatten(0, 1)[None]
        end = whole.shape[1]
        for ends in ([0, end - 1], [0, 3, 2, end]):
            cu_seqlens = torch.tensor(ends, dtype=torch.int32)
            calls.append(("cu_seqlens", partial(subject.part, whole, cu_seqlens=cu_seqlens)))
    if accepts(part, "state"):
        calls.append(("state", lambda: subject.part(x, state=subject.start(case.batch + 1))))
        calls.append(("state", lambda: subject.part(x, state=[1])))
    for name, call in calls:
        try:
            call()
        except ValueError as error:
            text = str(error)
            right = text.startswith(name) and "expected" in text and "got" in text
            assert right, f"the message is {text!r}, expected '{name}: expected ..., got ...'"
        except Exception as error:
            raise AssertionError(
                f"a bad {name} gave {type(error).__name__}: {error}, expected a ValueError"
            ) from error
        else:
            raise AssertionError(f"a bad {name} was accepted")


def _packed_pieces_are_one_pass(part: Any, case: PartInputs, _options: Options) -> None:
    """Packed pieces of several sequences give what each sequence gives in one pass."""
    subject = LayerSubject(part, case)
    sequences = list(subject.inputs["x"])
    # each sequence is cut at different positions
    own = [
        [0, *sorted((cut + 5 * n) % (case.tokens + 1) for cut in case.cuts), case.tokens]
        for n in range(len(sequences))
    ]

    @torch.no_grad()
    def whole() -> Results:
        return subject.run(subject.inputs)[0]

    with torch.no_grad():
        state = subject.start(len(sequences))
        results_of: list[list[Results]] = [[] for _ in sequences]
        for i in range(len(case.cuts) + 1):
            parts = [x[ends[i] : ends[i + 1]] for x, ends in zip(sequences, own, strict=True)]
            packed = torch.cat(parts)[None] if parts else subject.inputs["x"].flatten(0, 1)[None]
            cu_seqlens = borders([len(one) for one in parts])
            results, state = subject.run({"x": packed}, state, cu_seqlens)
            if packed.shape[1] == 0 and case.tokens:
                continue  # an empty piece has no decisions, so its number of heads is undefined
            for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
                results_of[n].append(by_token(results, slice(begin, end)))
        exact = whole()
        for n, of_pieces in enumerate(results_of):
            got = {
                name: torch.cat([piece[name] for piece in of_pieces], 1) for name in of_pieces[0]
            }
            if "evict_at" in got:  # a later piece may have lowered it
                got["evict_at"] = torch.minimum(got["evict_at"], exact["evict_at"][n : n + 1])
            with prefixed(f"sequence {n}, cut at {own[n]}"):
                assert_same(got, {name: x[n : n + 1] for name, x in exact.items()}, _only(whole, n))


def _only(run: Callable[[], Results], n: int) -> Callable[[], Results]:
    """The results of sequence `n`."""
    return lambda: {name: x[n : n + 1] for name, x in run().items()}


def _no_argument(name: str, what: str) -> Callable[[Any, Options], str | None]:
    return lambda part, _options: None if accepts(part, name) else f"it {what}"


class _ReadsNothing:
    """Prepares tokens as another attention part does, and returns 0 for every query."""

    def __init__(self, attention: Any) -> None:
        if hasattr(attention, "prepare"):
            self.prepare = attention.prepare  # a gate may score what is stored

    def __call__(self, q: Tensor, keys: object) -> Tensor:
        return torch.zeros_like(q)


def _stores_nothing(part: Any, options: Options) -> str | None:
    if isinstance(part, HAMLayer) and part.attention is None:
        return "it has no attention and stores nothing"
    return _no_ham_layer(part, options)


def _no_ham_layer(part: Any, _options: Options) -> str | None:
    return None if isinstance(part, HAMLayer) else "it is not a HAMLayer"


def _not_monotone(part: Any, options: Options) -> str | None:
    if _no_ham_layer(part, options) is not None:
        return "it is not a HAMLayer"
    return why_not_monotone(part) if thresholds(part) else "it has no threshold to set"


def _no_fork(part: Any, options: Options) -> str | None:
    if not accepts(part, "state"):
        return "it accepts no state"
    state = made(part, None, options.dtypes[0], 0).init_state(1)
    return None if hasattr(state, "fork") else "its states do not fork"


STREAMS = _no_argument("state", "accepts no state")
PACKS = _no_argument("cu_seqlens", "accepts no packed sequences")
CASES = cases_of(part_inputs)


def _common() -> list[Check]:
    found = []
    for check in common(LayerSubject, share=2):
        if "packed" in check.name:
            check = replace(check, applies=PACKS)
        elif "split" in check.name:
            check = replace(check, applies=STREAMS)
        found.append(check)
    return found


def _check(name: str, body: Any, cases: Any = CASES, edges: Any = SPLIT, **more: Any) -> Check:
    return Check(f"check_layer_{name}", "layer", body, cases, edges, **({"share": 2} | more))


def _any_dtype(options: Options) -> Any:
    return part_inputs(**(exact(options) | {"dtype": st.sampled_from(options.dtypes)}))


CHECKS = [
    *_common(),
    _check(
        "packed_pieces_are_one_pass",
        _packed_pieces_are_one_pass,
        applies=lambda part, options: STREAMS(part, options) or PACKS(part, options),
    ),
    _check("stores_what_it_decided", _stores_what_it_decided, applies=_stores_nothing),
    _check("forks_go_on_alone", _forks_go_on_alone, applies=_no_fork),
    _check("low_precision_streams", _low_precision_streams, _any_dtype, share=4, applies=STREAMS),
    _check(
        "limits_of_the_threshold", _limits_of_the_threshold, edges=EDGES, applies=_stores_nothing
    ),
    _check(
        "raising_tau_never_keeps_more",
        _raising_tau_never_keeps_more,
        edges=EDGES,
        applies=_not_monotone,
    ),
    _check("refuses_bad_input", _refuses_bad_input, None, edges_of({})),
]
