"""Checks of memories: `memory(x, q, k, v, position=, state=, cu_seqlens=, metric=) -> read, Trace, state`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from hamblocks.state import leaves, tree_map
from hamblocks.testing.budget import assert_same
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import EDGES, PACKED, SPLIT, cases_of, common
from hamblocks.testing.comparing import by_token, told
from hamblocks.testing.inputs.draw import Draw, borders
from hamblocks.testing.inputs.parts import PartInputs, packed_part_inputs, part_inputs
from hamblocks.testing.subjects import MemorySubject, Results
from hamblocks_ops import surprise
from hamblocks_ops.surprise import METRICS


def _score_is_the_surprise_of_the_residual(part: Any, case: PartInputs, _options: Options) -> None:
    """With a metric the trace has the surprise of the residual that it has without one, and the read is the same."""
    subject = MemorySubject(part, case)
    plain, _ = subject.run(subject.inputs)
    assert "residual" in plain, "trace.residual: None without a metric, expected a tensor"
    for subject.metric in METRICS:
        metric = subject.metric

        def expected(metric: str = metric) -> Results:
            subject.metric = None
            told = subject.run(subject.inputs)[0]
            return {
                "read": told["read"].detach(),
                "score": surprise(told["residual"], told["v"], metric=metric).detach(),
            }

        results, _ = subject.run(subject.inputs)
        assert "score" in results, f"trace.score: None with metric {metric!r}, expected a tensor"
        assert not results["score"].requires_grad, "trace.score: carries a gradient, expected none"
        with told(f"with metric {metric!r}"):
            assert_same(
                {name: results[name].detach() for name in ("read", "score")}, expected(), expected
            )


def _predicts_before_it_writes(part: Any, case: PartInputs, _options: Options) -> None:
    """The prediction v - residual of a token knows nothing of its own value: the residual is read before the write."""
    subject = MemorySubject(part, case)
    t = min(case.cuts[0], max(case.tokens - 1, 0))
    changed = dict(subject.inputs)
    changed["v"] = changed["v"].clone()
    changed["v"][:, t : t + 1] = (
        Draw(case.seed + 1).normal(*changed["v"][:, t : t + 1].shape).to(case.dtype)
    )

    @torch.no_grad()
    def prediction(inputs: dict[str, torch.Tensor]) -> Results:
        results, _ = subject.run(inputs)
        return {"prediction": (results["v"] - results["residual"])[:, : t + 1]}

    with told(f"the prediction at position {t} changed with the value at {t}"):
        # v - residual leaves a small prediction with the rounding of v, which moves with v
        assert_same(
            prediction(changed), prediction(subject.inputs), lambda: prediction(subject.inputs)
        )


def _state_has_sequences_first(part: Any, case: PartInputs, _options: Options) -> None:
    """The state is a tree whose tensors have the sequences as first dimension: reordering it reorders what follows."""
    subject = MemorySubject(part, case)
    t = min(case.cuts[0], case.tokens)
    order = torch.arange(case.batch).flip(0)
    with torch.no_grad():
        _, state = subject.run(by_token(subject.inputs, slice(0, t)))
        for number, x in enumerate(leaves(state)):
            assert x.shape[:1] == (case.batch,), (
                f"tensor {number} of the state: {list(x.shape)}, expected [N, ...]"
            )
        rest = by_token(subject.inputs, slice(t, None))

        def run() -> Results:
            return {name: x[order] for name, x in subject.run(rest, state)[0].items()}

        moved = {name: x[order] for name, x in rest.items()}
        got, _ = subject.run(moved, tree_map(lambda x: x[order], state))
        with told("a reordered state gives another result than reordered sequences"):
            assert_same(got, run(), run)


def _packed_states_are_one_by_one(part: Any, case: PartInputs, _options: Options) -> None:
    """Packed pieces go on from their own states: what one sequence left is never another's."""
    subject = MemorySubject(part, case)
    assert case.packed is not None
    own = borders(case.packed).tolist()
    spans = list(pairwise(own))
    halves = [begin + (end - begin) // 2 for begin, end in spans]
    first = [slice(begin, half) for (begin, _), half in zip(spans, halves, strict=True)]
    second = [slice(half, end) for (_, end), half in zip(spans, halves, strict=True)]

    def gathered(parts: list[slice]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = {
            name: torch.cat([x[:, :0], *(x[:, own] for own in parts)], 1)
            for name, x in subject.inputs.items()
        }
        return inputs, borders([part.stop - part.start for part in parts])

    with torch.no_grad():
        _, state = subject.run(gathered(first)[0], None, gathered(first)[1])
        got, _ = subject.run(gathered(second)[0], state, gathered(second)[1])

        @torch.no_grad()
        def alone() -> Results:
            rows = []
            for before, after in zip(first, second, strict=True):
                _, past = subject.run(by_token(subject.inputs, before))
                rows.append(subject.run(by_token(subject.inputs, after), past)[0])
            return {
                name: torch.cat([x[:, :0], *(row[name] for row in rows)], 1)
                for name, x in got.items()
            }

        with told("packed pieces that go on give another result than one by one"):
            assert_same(got, alone(), alone)


CHECKS = [
    *common(MemorySubject),
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
        "check_memory_packed_states_are_one_by_one",
        "memory",
        _packed_states_are_one_by_one,
        cases_of(packed_part_inputs),
        PACKED,
    ),
]
