"""Checks of memories: `memory(x, q, k, v, position=, state=, cu_seqlens=, metric=)`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from hamblocks.protocols import MemoryTrace, ReadsUnstored
from hamblocks.state import leaves, tree_map
from hamblocks.testing.budget import assert_same
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import EDGES, PACKED, SPLIT, cases_of, common, edges_of
from hamblocks.testing.comparing import by_token, prefixed
from hamblocks.testing.inputs.draw import Draw, borders
from hamblocks.testing.inputs.parts import PartInputs, packed_part_inputs, part_inputs
from hamblocks.testing.subjects import MemorySubject, Results
from hamblocks_ops import surprise
from hamblocks_ops.arguments import describe
from hamblocks_ops.surprise import METRICS


def _can_be_called(part: Any, case: PartInputs, _options: Options) -> None:
    """Called as a layer calls it, the memory returns (read, MemoryTrace, state)."""
    subject = MemorySubject(part, case)
    expected = "expected a tuple (read, MemoryTrace, state)"
    inputs = {name: x for name, x in subject.inputs.items() if name != "stored"}
    output = subject.part(**inputs, state=None, cu_seqlens=None, metric=None)
    assert isinstance(output, tuple), f"output: {expected}, got {describe(output)}"
    assert len(output) == 3, f"output: {expected}, got {len(output)} values"
    assert isinstance(output[1], MemoryTrace), (
        f"trace: expected a MemoryTrace, got {describe(output[1])}"
    )


def _score_is_the_surprise_of_the_residual(part: Any, case: PartInputs, _options: Options) -> None:
    """With a metric, `trace.score` is the surprise of the residual, and the read stays the same."""
    subject = MemorySubject(part, case)
    subject.inputs = {
        name: x.requires_grad_(x.is_floating_point()) for name, x in subject.inputs.items()
    }
    plain, _ = subject.run(subject.inputs)
    assert "residual" in plain, "trace.residual: None without a metric, expected a tensor"
    for metric in METRICS:
        subject.metric = metric
        results, _ = subject.run(subject.inputs)
        assert "score" in results, f"trace.score: None with metric {metric!r}, expected a tensor"
        assert not results["score"].requires_grad, "trace.score: carries a gradient, expected none"
        got = {name: results[name].detach() for name in ("read", "score")}

        def expected(metric: str = metric) -> Results:
            subject.metric = None
            results = subject.run(subject.inputs)[0]
            score = surprise(results["residual"], results["v"], metric=metric)
            return {"read": results["read"].detach(), "score": score.detach()}

        with prefixed(f"with metric {metric!r}"):
            assert_same(got, expected(), expected)


def _predicts_before_it_writes(part: Any, case: PartInputs, _options: Options) -> None:
    """The prediction v - residual of a token does not depend on its own value: read, then write."""
    subject = MemorySubject(part, case)
    t = min(case.cuts[0], max(case.tokens - 1, 0))
    changed = dict(subject.inputs)
    changed["v"] = changed["v"].clone()
    own = changed["v"][:, t : t + 1]
    own.copy_(Draw(case.seed + 1).normal(*own.shape))

    @torch.no_grad()
    def prediction(inputs: dict[str, torch.Tensor]) -> Results:
        results, _ = subject.run(inputs)
        return {"prediction": (results["v"] - results["residual"])[:, : t + 1]}

    with prefixed(f"the prediction at position {t} changed with the value at {t}"):
        # A small prediction v - residual has the rounding error of v, which differs between the two
        # calls.
        assert_same(
            prediction(changed), prediction(subject.inputs), lambda: prediction(subject.inputs)
        )


def _state_has_sequences_first(part: Any, case: PartInputs, _options: Options) -> None:
    """The state is a tree of tensors `[N, ...]`: reordering it reorders what its sequences get."""
    subject = MemorySubject(part, case)
    t = max(1, min(case.cuts[0], case.tokens - 1))
    order = torch.arange(case.batch).flip(0)
    with torch.no_grad():
        _, state = subject.run(by_token(subject.inputs, slice(0, t)))
        for number, x in enumerate(leaves(state)):
            assert x.shape[:1] == (case.batch,), (
                f"tensor {number} of the state: {list(x.shape)}, expected [N, ...]"
            )
        if t == case.tokens:
            return  # one token: no token after the state
        rest = by_token(subject.inputs, slice(t, None))

        def run() -> Results:
            return {name: x[order] for name, x in subject.run(rest, state)[0].items()}

        moved = {name: x[order] for name, x in rest.items()}
        got, _ = subject.run(moved, tree_map(lambda x: x[order], state))
        with prefixed("a reordered state gives another result than reordered sequences"):
            assert_same(got, run(), run)


def _fresh_state_is_zero(part: Any, case: PartInputs, _options: Options) -> None:
    """A state of zeros gives what `state=None` gives: a layer clears a state by zeroing it."""
    subject = MemorySubject(part, case)
    cu_seqlens = None if case.packed is None else borders(case.packed)

    @torch.no_grad()
    def run(state: Any) -> tuple[Results, Any]:
        results, after = subject.run(subject.inputs, state, cu_seqlens)
        return results | {f"state {i}": x for i, x in enumerate(leaves(after))}, after

    fresh, after = run(None)
    with prefixed("a state of zeros gives another result than state=None"):
        assert_same(run(tree_map(torch.zeros_like, after))[0], fresh, lambda: run(None)[0])


def _packed_states_are_one_by_one(part: Any, case: PartInputs, _options: Options) -> None:
    """Packed sequences go on from their own states, not from each other's."""
    subject = MemorySubject(part, case)
    assert case.packed is not None
    spans = list(pairwise(borders(case.packed).tolist()))
    # each sequence is cut in the middle: one packed call for the first halves, one for the second
    halves = [begin + (end - begin) // 2 for begin, end in spans]
    first = [slice(begin, half) for (begin, _), half in zip(spans, halves, strict=True)]
    second = [slice(half, end) for (_, end), half in zip(spans, halves, strict=True)]

    def packed(parts: list[slice], state: Any) -> tuple[Results, Any]:
        if not any(own.stop > own.start for own in parts):
            return {}, state  # parts are never called without tokens
        inputs = {
            name: torch.cat([x[:, :0], *(x[:, own] for own in parts)], 1)
            for name, x in subject.inputs.items()
        }
        return subject.run(inputs, state, borders([own.stop - own.start for own in parts]))

    with torch.no_grad():
        got, _ = packed(second, packed(first, None)[1])

        @torch.no_grad()
        def alone() -> Results:
            found = []
            for before, after in zip(first, second, strict=True):
                past = None
                if before.stop > before.start:
                    _, past = subject.run(by_token(subject.inputs, before))
                if after.stop > after.start:
                    found.append(subject.run(by_token(subject.inputs, after), past)[0])
            return {
                name: torch.cat([x[:, :0], *(one[name] for one in found)], 1)
                for name, x in got.items()
            }

        with prefixed("packed sequences that go on give another result than each alone"):
            assert_same(got, alone(), alone)


def _reads_what_is_not_stored(part: Any, case: PartInputs, _options: Options) -> None:
    """`read_unstored` reads 0 where all is stored, and what the call reads where nothing is."""
    subject = MemorySubject(part, case)
    inputs = dict(subject.inputs)
    stored = inputs.pop("stored")

    @torch.no_grad()
    def read(stored: torch.Tensor) -> Results:
        return {"read": subject.run(inputs | {"stored": stored})[0]["read"]}

    @torch.no_grad()
    def called() -> Results:
        return {"read": subject.run(inputs)[0]["read"]}

    everything = read(torch.ones_like(stored))["read"]
    assert not bool(everything.any()), "read: not 0, with every token stored since the first"
    with prefixed("with nothing stored the read differs from that of the call"):
        assert_same(read(torch.zeros_like(stored)), called(), called)


def _does_not_wait(part: Any, _options: Options) -> str | None:
    return None if isinstance(part, ReadsUnstored) else "it has no read_unstored"


CHECKS = [
    *common(MemorySubject),
    Check("check_memory_can_be_called", "memory", _can_be_called, edges=edges_of({})),
    Check(
        "check_memory_score_is_the_surprise_of_the_residual",
        "memory",
        _score_is_the_surprise_of_the_residual,
        cases_of(part_inputs),
        EDGES,
        share=2,
    ),
    Check(
        "check_memory_predicts_before_it_writes",
        "memory",
        _predicts_before_it_writes,
        cases_of(part_inputs),
        EDGES,
    ),
    Check(
        "check_memory_state_has_sequences_first",
        "memory",
        _state_has_sequences_first,
        cases_of(part_inputs),
        SPLIT,
        share=2,
    ),
    Check(
        "check_memory_fresh_state_is_zero",
        "memory",
        _fresh_state_is_zero,
        cases_of(part_inputs),
        lambda options: [*EDGES(options), *PACKED(options)],
        share=2,
    ),
    Check(
        "check_memory_packed_states_are_one_by_one",
        "memory",
        _packed_states_are_one_by_one,
        cases_of(packed_part_inputs),
        PACKED,
    ),
    Check(
        "check_memory_reads_what_is_not_stored",
        "memory",
        _reads_what_is_not_stored,
        cases_of(part_inputs),
        EDGES,
        share=2,
        applies=_does_not_wait,
    ),
]
