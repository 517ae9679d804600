"""The table of ops: how calls of each op are drawn, and its reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hamblocks_ops as ops
from hamblocks.testing.inputs.attention import AttentionInputs, EvictAt, attention_inputs, evict_at
from hamblocks.testing.inputs.delta_rule import DeltaRuleInputs, delta_rule_inputs
from hamblocks.testing.inputs.draw import placing
from hamblocks.testing.inputs.paged import PagedInputs, paged, paged_inputs
from hamblocks.testing.inputs.rows import RowInputs, row_inputs
from hamblocks.testing.inputs.scores import Scores, scores
from hamblocks_ops.packing import NEVER
from hamblocks_ops.select import reference as lifetimes
from hamblocks_ops.surprise import METRICS

INF = float("inf")
DELTA, ATTEND, PAGED = DeltaRuleInputs, AttentionInputs, PagedInputs


@dataclass(frozen=True)
class Calls:
    """Calls of one op and their expected results. The `hints` of the op say what it promises.

    Attributes:
        inputs: strategy of calls.
        edges: fixed calls with degenerate sizes and boundary cases.
        small: calls for the checks that run only a few; empty: the third one of `edges`.
        options: makes the arguments that are not tensors from the seed of the case.
        reference: called like the op, without `impl`; None: the op with impl="reference".
        yardsticks: by name of the implementation, a callable that has the same low-precision
            arithmetic, where this differs from the reference. The implementation may have an error
            as large as that of the callable.
        dtypes: floating dtypes that the op accepts.
        degenerate: calls with zeros and infinities whose results must be finite.
        call: calls the op with tensors by name; None: the op itself.
    """

    inputs: Callable[..., st.SearchStrategy[Any]]
    edges: Sequence[Any]
    small: Sequence[Any] = ()
    options: Callable[[Any], dict[str, Any]] = lambda _case: {}
    reference: Callable[..., Any] | None = None
    yardsticks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
    degenerate: Sequence[Any] = ()
    call: Callable[..., Any] | None = None

    @property
    def fields(self) -> set[str]:
        """Names of the fields of a case."""
        return set(type(self.edges[0]).__dataclass_fields__)


def _through_chunks(
    *, metric: str | None = None, output_residual: bool = True, **call: Any
) -> ops.DeltaRuleOutput:
    """The chunked delta rule, with the residual computed as in fla: (beta * residual) / beta.

    beta * residual is rounded to the dtype of v.
    """
    beta, v = (
        torch.where(call["beta"] == 0, call["beta"] + 2.0**-64, call["beta"]),
        call["v"].detach(),
    )
    result = ops.gated_delta_rule(**call | {"beta": beta}, impl="chunked")
    if metric is not None and result.residual is not None:
        beta = beta.detach()[..., None]
        kept = (beta * result.residual.detach()).to(v.dtype)
        result = result._replace(score=ops.surprise(kept.float() / beta, v.float(), metric=metric))
    return result if output_residual else result._replace(residual=None)


def metric_of(case: Any) -> dict[str, Any]:
    """A metric that depends on the seed of the case."""
    return {"metric": METRICS[case.seed % len(METRICS)]}


def _metric_or_none(case: Any) -> dict[str, Any]:
    return {"metric": (*METRICS, None)[case.seed % (len(METRICS) + 1)]}


def _tau(case: Scores) -> dict[str, Any]:
    return {"tau": (0.0, 0.25, -0.5, INF, -INF, 1.0, -0.0)[case.seed % 7]}


def _count(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda case: {name: (2, 0, 1, 3, 5, 40, 2**40)[case.seed % 7]}


def placed(
    like: Tensor, position: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Position int64 `[B, T, H]` of every token and, if packed, its sequence `[T]`, by loops."""
    batch, tokens, heads = like.shape
    lengths = [tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()
    own, sequence = placing(lengths)
    where = own[None, :, None].expand(batch, tokens, heads) if position is None else position.long()
    return where, None if cu_seqlens is None else sequence


def _by_definition(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reference(
        score: Tensor,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        where, sequence = placed(score, position, cu_seqlens)
        return rule(score, where, sequence, **options).to(torch.int32)

    return reference


def compact_by_definition(
    evict_at: Tensor, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> ops.Compacted:
    """The lists of `compact`, by loops over tokens."""
    where, sequence = placed(evict_at, position, cu_seqlens)
    batch, tokens, heads = evict_at.shape
    kept = [
        [[t for t in range(tokens) if evict_at[b, t, h] > where[b, t, h]] for h in range(heads)]
        for b in range(batch)
    ]
    length = max((len(row) for rows in kept for row in rows), default=0)
    lists = [
        torch.full((batch, heads, length), fill, dtype=torch.int32) for fill in (tokens, NEVER, 0)
    ]
    counted = torch.zeros(
        batch if cu_seqlens is None else len(cu_seqlens) - 1, heads, dtype=torch.int32
    )
    for b in range(batch):
        for h in range(heads):
            for slot, t in enumerate(kept[b][h]):
                for x, value in zip(
                    lists, (t, int(where[b, t, h]), int(evict_at[b, t, h])), strict=True
                ):
                    x[b, h, slot] = value
                counted[b if sequence is None else int(sequence[t]), h] += 1
    index, position_of, until = lists
    return ops.Compacted(index, position_of, until, counted)


def _paged(run: Callable[..., Any] | None, *, impl: str, **call: Any) -> Any:
    return paged(**call, impl=impl, run=run)


SCORE_EDGES = (
    Scores(tokens=0),
    Scores(batch=0),
    Scores(tokens=1, heads=1),
    Scores(tokens=65, kind="constant"),
    Scores(tokens=64, kind="infinite"),
    Scores(tokens=40, kind="ties", empty_rows=True, layout="strided"),
    Scores(packed=(0, 5, 0, 0, 33, 1, 0), kind="ties"),
    Scores(packed=(0, 5, 0, 33, 1, 0), kind="mixed", empty_rows=True),
    Scores(packed=()),
    *(Scores(tokens=12, kind="mixed", seed=seed) for seed in range(7)),
)
CALLS: dict[str, Calls] = {
    "gated_delta_rule": Calls(
        delta_rule_inputs,
        (
            DELTA(tokens=0),
            DELTA(tokens=1),
            DELTA(batch=0),
            DELTA(tokens=63, heads=1),
            DELTA(tokens=64, group=3, layout="transposed"),
            DELTA(tokens=65, decay="forget", layout="strided"),
            DELTA(tokens=130, decay="hard", write="any"),
            DELTA(tokens=65, write="zero"),
            DELTA(tokens=130, write="two", decay="none"),
            DELTA(tokens=65, key_dim=1, write="two", decay="none"),
            DELTA(packed=()),
            DELTA(packed=(0,)),
            DELTA(packed=(0, 3, 0, 0, 65, 1, 0)),
            DELTA(packed=(64, 64), state=False, group=2),
        ),
        small=(DELTA(tokens=3, batch=1, group=2), DELTA(packed=(1, 0, 2), heads=1)),
        options=_metric_or_none,
        yardsticks={"fla": _through_chunks},
        degenerate=(
            DELTA(write="zero", decay="forget"),
            DELTA(tokens=65, write="zero", decay="none", state=False),
            DELTA(tokens=70, write="any", decay="forget", dtype=torch.bfloat16),
        ),
    ),
    "surprise": Calls(
        row_inputs,
        (RowInputs(batch=0), RowInputs(tokens=1, batch=1, dim=1), RowInputs(layout="strided")),
        small=[RowInputs(seed=seed) for seed in range(3)],
        options=metric_of,
        degenerate=[
            RowInputs(kind=kind, dtype=dtype, seed=seed)
            for kind in ("zero", "right", "extreme")
            for dtype in (torch.float32, torch.bfloat16)
            for seed in range(3)
        ],
    ),
    "select_threshold": Calls(
        scores,
        SCORE_EDGES,
        options=_tau,
        reference=_by_definition(
            lambda score, where, _sequence, *, tau: lifetimes.threshold(
                score.to(torch.promote_types(score.dtype, torch.float32)), tau, where
            )
        ),
    ),
    "select_topk": Calls(
        scores,
        SCORE_EDGES,
        options=_count("k"),
        reference=_by_definition(
            lambda score, where, sequence, *, k: lifetimes.topk(score, k, where, sequence)
        ),
    ),
    "select_window": Calls(
        scores,
        SCORE_EDGES,
        options=_count("width"),
        reference=_by_definition(
            lambda _score, where, _sequence, *, width: lifetimes.window(width, where)
        ),
    ),
    "select_first": Calls(
        scores,
        SCORE_EDGES,
        options=_count("n"),
        reference=_by_definition(lambda _score, where, _sequence, *, n: lifetimes.first(n, where)),
    ),
    "compact": Calls(
        evict_at,
        (
            EvictAt(tokens=0),
            EvictAt(batch=0),
            EvictAt(packed=()),
            EvictAt(packed=(0, 4, 0, 6, 0)),
            EvictAt(tokens=65),
        ),
        reference=compact_by_definition,
    ),
    "selected_attention": Calls(
        attention_inputs,
        (
            ATTEND(tokens=0),
            ATTEND(tokens=1, policy="all"),
            ATTEND(tokens=1, policy="none"),
            ATTEND(batch=0),
            ATTEND(tokens=64, kv_heads=1, policy="all"),
            ATTEND(tokens=65, group=3, layout="transposed"),
            ATTEND(tokens=63, shared=True, layout="strided", bias="hidden"),
            ATTEND(tokens=130, policy="topk", bias="some"),
            ATTEND(tokens=130, policy="window"),
            ATTEND(tokens=9, cache=0),
            ATTEND(tokens=1, cache=70, group=2, policy="all"),
            ATTEND(tokens=33, cache=50, bias="hidden", seed=3),
            ATTEND(packed=()),
            ATTEND(packed=(0,)),
            ATTEND(packed=(0, 3, 0, 0, 65, 1, 0), bias="shared"),
        ),
        small=(
            ATTEND(tokens=4, batch=1, group=2, bias="some", seed=4),
            ATTEND(tokens=4, cache=5, bias="some", seed=4),
            ATTEND(packed=(2, 0, 3)),
        ),
        degenerate=(
            ATTEND(tokens=40, policy="none"),
            ATTEND(tokens=40, bias="hidden", group=2),
            ATTEND(tokens=33, cache=50, policy="none", dtype=torch.bfloat16),
        ),
    ),
    "paged_attention": Calls(
        paged_inputs,
        (
            PAGED(queries=0),
            PAGED(sequences=0),
            PAGED(width=0),
            PAGED(slabs=()),
            PAGED(slabs=((0, 4),)),
            PAGED(slabs=((0, 4), (12, 4), (0, 4)), queries=3),
            PAGED(slabs=((12, 32), (12, 1))),
            PAGED(slabs=((12, 4), (12, 0))),
            PAGED(slabs=((400, 2),), bias="hidden"),
            PAGED(slabs=((1, 70),), forked=True, queries=8, width=1),
            PAGED(
                width=90,
                slabs=((200, 3), (150, 3)),
                sequences=1,
                group=2,
                bias="some",
                policy="all",
            ),
            PAGED(policy="none", queries=2),
            PAGED(policy="all", queries=8, together=3, group=3, layout="strided"),
            PAGED(together=2, rows=1, group=2, layout="transposed", queries=4),
        ),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        degenerate=(
            PAGED(policy="none", garbage=INF),
            PAGED(queries=3, bias="hidden"),
        ),
        call=_paged,
    ),
}
