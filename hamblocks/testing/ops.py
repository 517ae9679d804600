"""The ops that the kit knows: how their calls are drawn, their references, and what implements them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hamblocks_ops as ops
from hamblocks.testing.budget import Problem, assert_bits
from hamblocks.testing.inputs.attention import AttentionInputs, EvictAt, attention_inputs, evict_at
from hamblocks.testing.inputs.delta_rule import DeltaRuleInputs, delta_rule_inputs
from hamblocks.testing.inputs.draw import placing
from hamblocks.testing.inputs.paged import PagedInputs, paged, paged_inputs
from hamblocks.testing.inputs.rows import RowInputs, row_inputs
from hamblocks.testing.inputs.scores import Scores, scores
from hamblocks.testing.settings import chosen
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import NEVER
from hamblocks_ops.select import reference as lifetimes
from hamblocks_ops.surprise import METRICS

INF = float("inf")


@dataclass(frozen=True)
class Op:
    """What the kit knows of one op.

    Attributes:
        function: the public op.
        inputs: strategy of its calls.
        edges: calls by hand: degenerate sizes and borders.
        options: arguments that are no tensors, out of the case's seed.
        reference: called like the op, without `impl`; None: the op with impl="reference".
        by_token: arguments with the tokens in their second dimension.
        streams: name of the argument that takes the state which the result of that other name hands on.
        causal: whether results before t depend on nothing from t on.
        packs: whether it takes cu_seqlens.
        attends: whether keys can be invisible.
        dtypes: floating dtypes it takes.
        degenerate: calls out of zeros and infinities that must give finite results.
        call: how it is called with tensors by name.
    """

    function: Callable[..., Any]
    inputs: Callable[..., st.SearchStrategy[Any]]
    edges: Sequence[Any]
    options: Callable[[Any], dict[str, Any]] = lambda _case: {}
    reference: Callable[..., Any] | None = None
    by_token: tuple[str, ...] = ()
    streams: tuple[str, str] | None = None
    causal: bool = True
    packs: bool = True
    attends: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
    degenerate: Sequence[Any] = ()
    call: Callable[..., Any] | None = None

    @property
    def differentiable(self) -> bool:
        """Whether it takes floating tensors whose gradient it promises."""
        return self.function in (ops.gated_delta_rule, ops.surprise, ops.selected_attention)


@dataclass(frozen=True)
class OpImplementation:
    """One way to compute an op: a name of its table, or a callable of one's own.

    Attributes:
        like: the op of `hamblocks.ops` whose signature and mathematics it has.
        run: a callable with the op's signature, without `impl`; None: the op itself.
        impl: the implementation to be named, where `run` is None; "auto" is what the op would take.
        device: where it runs; empty: what pytest was told by --hamblocks-device, else the CPU. Inputs are moved there
            and results back, so that they are compared with the reference on the CPU.
    """

    like: Callable[..., Any]
    run: Callable[..., Any] | None = None
    impl: str = "auto"
    device: str = ""

    def __post_init__(self) -> None:
        """Checks that the op is one of ours and has such an implementation."""
        object.__setattr__(self, "device", self.device or chosen().device)
        if self.like not in OPS:
            raise wrong("like", "one of " + ", ".join(one.__name__ for one in OPS), repr(self.like))
        names = ops.implementations(self.like)
        if self.run is None and self.impl != "auto" and self.impl not in names:
            raise wrong(
                "impl",
                f"'auto' or one of {', '.join(map(repr, names))} for {self.like.__name__}",
                repr(self.impl),
            )

    @property
    def op(self) -> Op:
        """What the kit knows of it."""
        return OPS[self.like]

    def __call__(self, **call: Any) -> Any:
        """Runs it on its device; results are on the CPU.

        Raises:
            AssertionError: it changed what it was given; elsewhere than on the CPU, where others check that.
        """
        if self.device == "cpu":
            return self._run(**call)
        there = self.moved(call)
        result = self._run(**there)
        given = {name: x.detach() for name, x in call.items() if isinstance(x, Tensor)}
        assert_bits({name: there[name].detach().cpu() for name in given}, given)
        if isinstance(result, Tensor):
            return result.cpu()
        return type(result)(*(None if x is None else x.cpu() for x in result))

    def moved(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, tensors on its device as they lie in memory."""
        return {
            name: _to(x, self.device) if isinstance(x, Tensor) else x for name, x in call.items()
        }

    def _run(self, **call: Any) -> Any:
        through = self.op.call
        if through is not None:
            return through(self.run, impl=self.impl, **call)
        if self.run is not None:
            return self.run(**call)
        return self.like(**call, **({"impl": self.impl} if ops.implementations(self.like) else {}))

    def reference(self, **call: Any) -> Any:
        """Runs the reference."""
        if self.op.call is not None:
            return self.op.call(None, impl="reference", **call)
        return (
            self.like(**call, impl="reference")
            if self.op.reference is None
            else self.op.reference(**call)
        )

    def problem(
        self, case: Any, tensors: Mapping[str, Tensor] | None = None, **options: Any
    ) -> Problem:
        """A case as a call that runs by this implementation or by the reference."""

        def either(impl: str, **call: Any) -> Any:
            if impl == "chunks":
                return _through_chunks(**call)
            return self.reference(**call) if impl == "reference" else self(**call)

        given = case.tensors() if tensors is None else tensors
        problem = Problem(either, given, self.op.options(case) | options, seed=case.seed)
        if self.impl == "fla" and problem.dtype in (torch.bfloat16, torch.float16):
            problem.products, problem.yardstick = problem.dtype, "chunks"
        return problem

    def __repr__(self) -> str:
        name = f"impl={self.impl!r}"
        if self.run is not None:
            name = getattr(self.run, "__qualname__", type(self.run).__name__)
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"OpImplementation({self.like.__name__}, {name}{device})"


def _to(x: Tensor, device: str) -> Tensor:
    result = x.to(device)
    if result is x or result.stride() == x.stride() or 0 in x.stride():
        return result
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def _through_chunks(
    *, metric: str | None = None, output_residual: bool = True, **call: Any
) -> ops.DeltaRuleOutput:
    """The delta rule in chunks whose residual is read off beta * residual in the dtype of v, as fla keeps it."""
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
    """A metric out of the case's seed."""
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
    """Position int64 `[B, T, H]` and, packed, sequence `[T]` of every token, by loops."""
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
    """Lists by loops over tokens."""
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
DELTA = DeltaRuleInputs
ATTEND = AttentionInputs
OPS: dict[Callable[..., Any], Op] = {
    one.function: one
    for one in (
        Op(
            ops.gated_delta_rule,
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
            options=_metric_or_none,
            by_token=("q", "k", "v", "beta", "g"),
            streams=("initial_state", "final_state"),
            degenerate=(
                DELTA(write="zero", decay="forget"),
                DELTA(tokens=65, write="zero", decay="none", state=False),
                DELTA(tokens=70, write="any", decay="forget", dtype=torch.bfloat16),
            ),
        ),
        Op(
            ops.surprise,
            row_inputs,
            (RowInputs(batch=0), RowInputs(tokens=1, batch=1, dim=1), RowInputs(layout="strided")),
            options=metric_of,
            by_token=("residual", "v"),
            packs=False,
            degenerate=[
                RowInputs(kind=kind, dtype=dtype, seed=seed)
                for kind in ("zero", "right", "extreme")
                for dtype in (torch.float32, torch.bfloat16)
                for seed in range(3)
            ],
        ),
        Op(
            ops.select_threshold,
            scores,
            SCORE_EDGES,
            options=_tau,
            reference=_by_definition(
                lambda score, where, _sequence, *, tau: lifetimes.threshold(
                    score.to(torch.promote_types(score.dtype, torch.float32)), tau, where
                )
            ),
            by_token=("score", "position"),
        ),
        Op(
            ops.select_topk,
            scores,
            SCORE_EDGES,
            options=_count("k"),
            reference=_by_definition(
                lambda score, where, sequence, *, k: lifetimes.topk(score, k, where, sequence)
            ),
            by_token=("score", "position"),
        ),
        Op(
            ops.select_window,
            scores,
            SCORE_EDGES,
            options=_count("width"),
            reference=_by_definition(
                lambda _score, where, _sequence, *, width: lifetimes.window(width, where)
            ),
            by_token=("score", "position"),
        ),
        Op(
            ops.select_first,
            scores,
            SCORE_EDGES,
            options=_count("n"),
            reference=_by_definition(
                lambda _score, where, _sequence, *, n: lifetimes.first(n, where)
            ),
            by_token=("score", "position"),
        ),
        Op(
            ops.compact,
            evict_at,
            (
                EvictAt(tokens=0),
                EvictAt(batch=0),
                EvictAt(packed=()),
                EvictAt(packed=(0, 4, 0, 6, 0)),
                EvictAt(tokens=65),
            ),
            reference=compact_by_definition,
            by_token=("evict_at",),
            causal=False,
        ),
        Op(
            ops.selected_attention,
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
            by_token=("q", "k", "v", "evict_at", "logit_bias"),
            attends=True,
            degenerate=(
                ATTEND(tokens=40, policy="none"),
                ATTEND(tokens=40, bias="hidden", group=2),
                ATTEND(tokens=33, cache=50, policy="none", dtype=torch.bfloat16),
            ),
        ),
        Op(
            ops.paged_attention,
            paged_inputs,
            (
                PagedInputs(queries=0),
                PagedInputs(sequences=0),
                PagedInputs(width=0),
                PagedInputs(slabs=()),
                PagedInputs(slabs=((0, 4),)),
                PagedInputs(slabs=((0, 4), (12, 4), (0, 4)), queries=3),
                PagedInputs(slabs=((12, 32), (12, 1))),
                PagedInputs(slabs=((12, 4), (12, 0))),
                PagedInputs(slabs=((400, 2),), bias="hidden"),
                PagedInputs(slabs=((1, 70),), forked=True, queries=8, width=1),
                PagedInputs(
                    width=90,
                    slabs=((200, 3), (150, 3)),
                    sequences=1,
                    group=2,
                    bias="some",
                    policy="all",
                ),
                PagedInputs(policy="none", queries=2),
                PagedInputs(policy="all", queries=8, together=3, group=3, layout="strided"),
                PagedInputs(together=2, rows=1, group=2, layout="transposed", queries=4),
            ),
            causal=False,
            packs=False,
            dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
            degenerate=(
                PagedInputs(policy="none", garbage=INF),
                PagedInputs(queries=3, bias="hidden"),
            ),
            call=_paged,
        ),
    )
}
