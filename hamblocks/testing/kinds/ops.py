"""Checks of ops: each implementation against the reference, forward and backward, and what every call promises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hamblocks_ops as ops
from hamblocks.testing.budget import assert_bits, assert_close_to_reference, assert_same
from hamblocks.testing.check import Check, NotApplicableError, Options
from hamblocks.testing.comparing import (
    assert_never_longer,
    assert_reads_what_was_written,
    assert_twice,
    compiled,
    told,
    unchanged,
)
from hamblocks.testing.inputs.attention import AttentionInputs
from hamblocks.testing.inputs.delta_rule import DeltaRuleInputs
from hamblocks.testing.inputs.draw import pieces, placing, ragged_lengths
from hamblocks.testing.inputs.paged import PagedInputs
from hamblocks.testing.inputs.rows import RowInputs
from hamblocks.testing.ops import Op, OpImplementation, metric_of
from hamblocks_ops.arguments import wrong
from hamblocks_ops.dispatch import interpreting

Results = dict[str, Tensor]
INF, NAN = float("inf"), float("nan")
DELTA, ATTEND = DeltaRuleInputs, AttentionInputs
INTERPRETED = ("triton", "fla")
FEW = 32
"""Triton's interpreter takes seconds for long cases by hand: there they are compared with the reference alone, and the
other checks draw half as many cases."""


def _is_the_reference(part: OpImplementation, case: Any, _options: Options) -> None:
    """Every result and every gradient is as right as the reference in that dtype: see assert_close_to_reference."""
    assert_close_to_reference(part.problem(case), "it")


def _results(
    part: OpImplementation, case: Any, tensors: Mapping[str, Tensor], *, backward: bool = False
) -> Results:
    return part.problem(case, tensors).run("it", backward=backward)


def _noise(
    part: OpImplementation,
    case: Any,
    tensors: Mapping[str, Tensor],
    cut: Callable[[Results], Results],
) -> Any:
    """What the reference says of these inputs, for a measure of how much rounding moves it."""
    return lambda: cut(part.problem(case, tensors).run("reference", backward=False))


def _is_causal(part: OpImplementation, case: Any, _options: Options) -> None:
    """Changing inputs from position t on changes no result before t, nor do results before t have a gradient there."""
    tensors = case.tensors()
    t = case.seed % (case.tokens + 1)
    other = replace(case, seed=case.seed + 1).tensors()
    changed = {
        name: torch.cat([x[:, :t], other[name][:, t:]], 1) if name in part.op.by_token else x
        for name, x in tensors.items()
    }

    def before(results: Results) -> Results:
        early = {name: x[:, :t] for name, x in results.items() if name != "final_state"}
        if early.keys() == {"result"} and not early["result"].is_floating_point():
            early["result"] = early["result"].clamp(max=t)
        return early

    with told(f"results before position {t} changed with the inputs from it on"):
        assert_same(
            before(_results(part, case, changed)),
            before(_results(part, case, tensors)),
            _noise(part, case, tensors, before),
        )
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    problem = part.problem(case, leaves)
    output = problem.op(**leaves, **problem.options, impl="it")
    fields = output._asdict() if hasattr(output, "_asdict") else {"result": output}
    roots = [
        x[:, :t]
        for name, x in fields.items()
        if x is not None and x.requires_grad and name != "final_state"
    ]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad and name in part.op.by_token}
    if not roots or not wanted:
        return
    grads = torch.autograd.grad(
        sum(x.double().sin().sum() for x in roots), list(wanted.values()), allow_unused=True
    )
    for name, grad in zip(wanted, grads, strict=True):
        later = torch.zeros(0) if grad is None else grad[:, t:]
        assert not bool((later != 0).any()), (
            f"grad of {name}: results before position {t} have one from it on"
        )


def _packed_is_one_by_one(part: OpImplementation, case: Any, _options: Options) -> None:
    """Sequences packed into one row give what they give alone; empty ones change nothing."""
    tensors = case.tensors()
    whole = _results(part, case, tensors)
    alone = []
    for n, own in enumerate(pieces(case.packed)):
        one = {name: x[:, own] for name, x in tensors.items() if name in part.op.by_token}
        if part.op.streams is not None and part.op.streams[0] in tensors:
            one[part.op.streams[0]] = tensors[part.op.streams[0]][n : n + 1]
        alone.append(_results(part, case, one))
    expected = {}
    for name, x in whole.items():
        by_sequence = name in ("final_state", "lengths")
        if by_sequence or part.like is not ops.compact:  # its lists have no dimension of tokens
            dim = 0 if by_sequence else 1
            expected[name] = torch.cat(
                [x.narrow(dim, 0, 0), *(results[name] for results in alone)], dim
            )
    got = {name: whole[name] for name in expected}
    with told("a sequence alone gives another result than packed"):
        assert_same(
            got,
            expected,
            _noise(part, case, tensors, lambda results: {name: results[name] for name in got}),
        )


def _any_split_is_one_pass(part: OpImplementation, case: Any, _options: Options) -> None:
    """Two pieces with the state handed over give what one pass gives."""
    assert part.op.streams is not None
    takes, gives = part.op.streams
    tensors = case.tensors()
    cut = case.seed % (case.tokens + 1)
    whole = _results(part, case, tensors)
    parts, state = [], tensors.get(takes)
    for own in (slice(0, cut), slice(cut, None)):
        piece = {name: x[:, own] for name, x in tensors.items() if name in part.op.by_token}
        parts.append(_results(part, case, piece | ({} if state is None else {takes: state})))
        state = parts[-1][gives]
    got = {
        name: state if name == gives else torch.cat([one[name] for one in parts], 1)
        for name in whole
    }
    with told(f"pieces of {cut} and {case.tokens - cut} tokens give another result than one pass"):
        assert_same(got, whole, _noise(part, case, tensors, lambda results: results))


def _same_call_same_bits(part: OpImplementation, case: Any, _options: Options) -> None:
    """The same call twice gives the same bits, forward and backward."""
    assert_twice(lambda: part.problem(case).run("it"))


def _nothing_given_changes(part: OpImplementation, case: Any, _options: Options) -> None:
    """Inputs are as before after a call, forward and backward."""
    tensors = case.tensors()
    with unchanged(tensors):
        _results(part, case, tensors, backward=True)


def _reads_no_unwritten_memory(part: OpImplementation, case: Any, _options: Options) -> None:
    """Results and gradients do not depend on what `torch.empty` happens to hold."""
    assert_reads_what_was_written(lambda: part.problem(case).run("it"))


def _is_always_finite(part: OpImplementation, case: Any, _options: Options) -> None:
    """Out of zeros, of nothing kept and of everything forgotten come finite results and gradients (lse may be -inf)."""
    for name, x in part.problem(case).run("it").items():
        fine = x.isfinite() | (x == -INF) if name == "lse" else x.isfinite()
        assert bool(fine.all()), f"{name}: {float(x[~fine][0])} in {case.dtype}"


def _gradients_are_right(part: OpImplementation, case: Any, _options: Options) -> None:
    """Gradients are those of finite differences, in float64."""
    problem = part.problem(case)
    names = [name for name, x in problem.tensors.items() if x.is_floating_point()]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        output = problem.op(
            **(dict(problem.tensors) | dict(zip(names, given, strict=True))),
            **problem.options,
            impl="it",
        )
        return tuple(
            x
            for x in (output if isinstance(output, tuple) else (output,))
            if x is not None and x.requires_grad
        )

    given = [problem.tensors[name].clone().requires_grad_() for name in names]
    with told("gradients differ from finite differences"):
        torch.autograd.gradcheck(run, given, fast_mode=True)


def _compiled_is_eager(part: OpImplementation, case: Any, _options: Options) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, forward and backward."""
    eager = part.problem(case)
    with compiled(part.run or part.like) as fast:
        traced = replace(part, run=fast if part.run is not None else _named(fast, part))
        results = traced.problem(case).run("it")
    with told("compiled and eager differ"):
        assert_same(results, eager.run("it"), lambda: eager.run("reference"))


def _named(fast: Callable[..., Any], part: OpImplementation) -> Callable[..., Any]:
    more = {"impl": part.impl} if ops.implementations(part.like) else {}
    return lambda *args, **call: fast(*args, **call, **more)


def _unseen_keys_do_not_leak(part: OpImplementation, case: Any, _options: Options) -> None:
    """Never stored, evicted before the first query, beyond key_lengths, hidden by -inf: it may hold anything."""
    if isinstance(case, PagedInputs):
        for garbage in (NAN, INF, 6e4):
            with told(f"{garbage} where no query sees it changed the result"):
                clean = part.problem(replace(case, garbage=None)).run("it")
                assert_bits(part.problem(replace(case, garbage=garbage)).run("it"), clean)
        return
    tensors = case.tensors()
    unseen = ~visible(tensors).any(1)[..., None]

    def with_garbage(value: float) -> Results:
        # also the clean call is made so: other strides would be other roundings
        filled = {name: tensors[name].masked_fill(unseen, value) for name in ("k", "v")}
        return _results(part, case, tensors | filled, backward=True)

    for garbage in (NAN, INF, 1e30):
        with told(f"{garbage} where no query sees it changed the result"):
            assert_bits(with_garbage(garbage), with_garbage(0.0))


def visible(call: Mapping[str, Tensor]) -> Tensor:
    """The dense mask `[B, Tq, Tk, Hkv]` of a call of selected_attention."""
    batch, keys, kv_heads = call["k"].shape[:3]
    queries = call["q"].shape[1]
    lengths = call["cu_seqlens"].diff().tolist() if "cu_seqlens" in call else [max(queries, keys)]
    own, sequence = placing(lengths)
    asks = call.get("query_position", own[None, :queries])[:, :, None, None]
    stands = call.get("key_position", own[None, :keys, None])[:, None]
    mask = (stands <= asks) & (asks < call["evict_at"][:, None])
    mask = mask & (sequence[:queries, None] == sequence[:keys])[None, :, :, None]
    if "key_lengths" in call:
        most = call["key_lengths"].unflatten(0, (batch, 1, 1))
        most = most if most.dim() == 4 else most[..., None]
        mask = mask & (torch.arange(keys)[None, None, :, None] < most)
    if "logit_bias" in call:
        mask = mask & (call["logit_bias"] > -INF)[:, None]
    return mask.expand(batch, queries, keys, kv_heads)


def _seeing_nothing_is_zero(part: OpImplementation, case: Any, _options: Options) -> None:
    """A query that sees nothing reads 0 with lse = -inf, and all gradients are 0."""
    results = part.problem(case).run("it")
    lse = results.pop("lse")
    assert bool((lse == -INF).all()), "lse: expected -inf where nothing is seen"
    for name, x in results.items():
        assert not bool((x != 0).any()), (
            f"{name}: {float(x[x != 0][0])} where nothing is seen, expected 0"
        )


def _score_is_the_surprise_of_the_residual(
    part: OpImplementation, case: Any, _options: Options
) -> None:
    """The score is that of the residual before it is rounded, detached, with or without the residual written out."""
    tensors = {
        name: x.clone().requires_grad_(x.is_floating_point()) for name, x in case.tensors().items()
    }
    metric = metric_of(case)["metric"]
    result, without = (
        part(**tensors, metric=metric, output_residual=told_too) for told_too in (True, False)
    )
    assert not result.score.requires_grad, "score: carries a gradient, expected none"
    assert without.residual is None, "residual: written out, expected None"
    with told("the score differs without the residual"):
        assert_bits({"score": without.score}, {"score": result.score})
    if case.dtype in (torch.float64, torch.float32):

        def expected() -> Results:
            return {
                "score": ops.surprise(
                    result.residual.detach(), tensors["v"].detach(), metric=metric
                )
            }

        assert_same({"score": result.score}, expected(), expected)


def _ignores_autocast(part: OpImplementation, case: Any, _options: Options) -> None:
    """Autocast does not reach inside: states and scores stay float32."""
    problem = part.problem(case)
    expected = problem.run("it")
    with torch.autocast(torch.device(part.device).type, dtype=torch.bfloat16):
        results = problem.run("it")
    with told("autocast changed the result"):
        assert_bits(results, expected)


def _raising_tau_never_keeps_more(part: OpImplementation, case: Any, _options: Options) -> None:
    """On the same scores, a higher threshold ends no lifetime later."""
    tensors = case.tensors()
    kept = [part(**tensors, tau=tau) for tau in (-INF, -1.0, 0.0, 0.25, 0.5, INF)]
    assert_never_longer(kept)


def _unless(flag: Callable[[Op], Any], reason: str) -> Callable[[Any, Options], str | None]:
    return lambda part, _options: None if flag(part.op) else reason


def _not_traced(part: OpImplementation, _options: Options) -> str | None:
    if part.like is ops.compact:
        return "its result is as long as the longest list, which is read from the device"
    if part.like is ops.paged_attention and part.run is None:
        return "it plans on the host which pages it reads"
    return (
        "the reference is written to be read, not to be traced"
        if part.impl == "reference"
        else None
    )


def _refused(part: OpImplementation, case: Any) -> str | None:
    """Why a named implementation cannot run here, with gradients, for most checks ask for them."""
    if part.run is None and part.impl != "auto" and ops.implementations(part.like):
        asked = functools.partial(ops.explain, part.like)
        if part.op.call is not None:
            asked = functools.partial(part.op.call, asked, impl=part.impl)
        tensors = {
            name: x.requires_grad_(x.is_floating_point()) for name, x in case.tensors().items()
        }
        answer: str = asked(**part.moved(tensors), **part.op.options(case)).get(part.impl, "yes")
        return None if answer.startswith("yes") else answer
    return None


def _length(case: Any) -> int:
    """Tokens or keys of a case."""
    packed, cache = getattr(case, "packed", None), getattr(case, "cache", None)
    return sum(packed) if packed is not None else getattr(case, "tokens", 0) + (cache or 0)


@functools.cache
def _dtypes(part: OpImplementation) -> dict[torch.dtype, str]:
    """The floating dtypes of the op that it refuses, with the reason: those in which no case by hand runs."""
    if "dtype" not in _fields(part.op):
        return {}
    found = {}
    for dtype in part.op.dtypes:
        answers = [_refused(part, replace(case, dtype=dtype)) for case in part.op.edges]
        if None not in answers:
            found[dtype] = str(answers[0])
    return found


@functools.cache
def _never(part: OpImplementation) -> str | None:
    """Why it runs none of the cases by hand, say without a GPU; None where it runs one."""
    if _runs(part):
        return None
    answers = [_refused(part, case) for case in part.op.edges]
    return None if None in answers else str(answers[0])


def _runs(part: OpImplementation) -> list[torch.dtype]:
    """The floating dtypes that it computes in, the widest first."""
    return [dtype for dtype in part.op.dtypes if dtype not in _dtypes(part)]


@dataclass(frozen=True)
class OpCheck(Check):
    """A check of an op: what is drawn depends on the op."""

    fixed: Callable[[Op], dict[str, Any]] = lambda _op: {}
    by_hand: Callable[[Op], Sequence[Any]] = lambda op: op.edges
    drawn: bool = True

    def of(self, part: OpImplementation) -> Check:
        """The check with the cases of one op."""
        op, runs = part.op, _runs(part)
        slowly = interpreting() and part.impl in INTERPRETED and self.body is not _is_the_reference

        def cases(_options: Options) -> st.SearchStrategy[Any]:
            fixed = self.fixed(op)
            if len(runs) == len(op.dtypes):
                return op.inputs(**fixed)
            if fixed.get("dtype", torch.float64) not in runs:
                fixed["dtype"] = runs[0] if "dtype" in fixed else st.sampled_from(runs)
            return op.inputs(**fixed).filter(lambda case: _refused(part, case) is None)

        def edges(_options: Options) -> list[Any]:
            by_hand = self.by_hand(op)
            if len(runs) < len(op.dtypes):
                by_hand = [
                    case if case.dtype in runs else replace(case, dtype=runs[0]) for case in by_hand
                ]
            if slowly:
                by_hand = [case for case in by_hand if _length(case) <= FEW]
            return [case for case in by_hand if _refused(part, case) is None]

        drawn = cases if self.drawn else None
        share = self.share * (2 if slowly else 1)
        return Check(self.name, self.kind, self.body, drawn, edges, self.applies, share, self.slow)

    def why_not(self, part: Any, options: Options | None = None) -> str | None:
        """As of every check, and why an implementation runs nothing here."""
        reason = super().why_not(part, options)
        if reason is not None or not isinstance(part, OpImplementation):
            return reason
        try:
            return _never(part)
        except Exception:  # then the check shows it
            return None

    def __call__(self, part: Any, case: Any = None, **more: Any) -> None:
        """Runs the check."""
        if not isinstance(part, OpImplementation):
            raise wrong("part", "an OpImplementation(like, run)", repr(part))
        never = _never(part)
        if never is not None:
            raise NotApplicableError(self.name, repr(part), never)
        self.of(part)(part, case, **more)


def _in(dtype: torch.dtype) -> OpCheck:
    name = str(dtype).removeprefix("torch.")
    return OpCheck(
        f"check_op_{name}_is_the_reference",
        "op",
        _is_the_reference,
        applies=lambda part, options: (
            _dtypes(part).get(dtype)
            if dtype in (*options.dtypes, torch.float16) and dtype in part.op.dtypes
            else f"it does not compute in {name}"
        ),
        fixed=lambda op: {} if "dtype" not in _fields(op) else {"dtype": dtype},
        by_hand=lambda op: [
            replace(case, dtype=dtype) if "dtype" in _fields(op) else case for case in op.edges
        ],
    )


def _fields(op: Op) -> set[str]:
    return set(type(op.edges[0]).__dataclass_fields__)


def _exact(op: Op, **more: Any) -> dict[str, Any]:
    return {name: x for name, x in ({"dtype": torch.float64} | more).items() if name in _fields(op)}


def _small(op: Op) -> list[Any]:
    """Cases for the checks that run one or two."""
    found: dict[Any, list[Any]] = {
        ops.gated_delta_rule: [DELTA(tokens=3, batch=1, group=2), DELTA(packed=(1, 0, 2), heads=1)],
        ops.surprise: [RowInputs(seed=seed) for seed in range(3)],
        ops.selected_attention: [
            ATTEND(tokens=4, batch=1, group=2, bias="some", seed=4),
            ATTEND(tokens=4, cache=5, bias="some", seed=4),
            ATTEND(packed=(2, 0, 3)),
        ],
    }
    return found.get(op.function, list(op.edges[2:3]))


def _plain(op: Op) -> dict[str, Any]:
    return _exact(op, packed=None, cache=None, empty_rows=False)


def _whole(op: Op) -> list[Any]:
    kept = [
        case
        for case in op.edges
        if getattr(case, "packed", None) is None and getattr(case, "cache", None) is None
    ]
    return [replace(case, **_plain(op)) for case in kept]


def _packed_cases(op: Op) -> list[Any]:
    return [
        replace(case, **_exact(op, cache=None))
        for case in op.edges
        if getattr(case, "packed", None) is not None
    ]


CHECKS: list[OpCheck] = [
    _in(torch.float64),
    _in(torch.float32),
    _in(torch.bfloat16),
    _in(torch.float16),
    OpCheck(
        "check_op_is_causal",
        "op",
        _is_causal,
        applies=_unless(lambda op: op.causal, "it lists what is stored, which the future decides"),
        fixed=_plain,
        by_hand=_whole,
    ),
    OpCheck(
        "check_op_packed_is_one_by_one",
        "op",
        _packed_is_one_by_one,
        applies=_unless(lambda op: op.packs, "it takes no packed sequences"),
        fixed=lambda op: _exact(op, packed=ragged_lengths(20, 5), cache=None),
        by_hand=_packed_cases,
    ),
    OpCheck(
        "check_op_any_split_is_one_pass",
        "op",
        _any_split_is_one_pass,
        applies=_unless(lambda op: op.streams, "it hands no state on"),
        fixed=_plain,
        by_hand=lambda op: [replace(case, seed=seed) for case in _whole(op) for seed in (0, 64)],
    ),
    OpCheck("check_op_same_call_same_bits", "op", _same_call_same_bits, share=2),
    OpCheck("check_op_nothing_given_changes", "op", _nothing_given_changes, share=2),
    OpCheck("check_op_reads_no_unwritten_memory", "op", _reads_no_unwritten_memory, share=2),
    OpCheck(
        "check_op_is_always_finite",
        "op",
        _is_always_finite,
        applies=_unless(lambda op: op.degenerate, "its results are integers"),
        by_hand=lambda op: op.degenerate,
        drawn=False,
    ),
    OpCheck(
        "check_op_gradients_are_right",
        "op",
        _gradients_are_right,
        applies=lambda part, _options: (
            _dtypes(part).get(torch.float64)
            if part.op.differentiable
            else "it promises no gradient"
        ),
        by_hand=_small,
        drawn=False,
    ),
    OpCheck(
        "check_op_compiled_is_eager",
        "op",
        _compiled_is_eager,
        applies=_not_traced,
        by_hand=_small,
        drawn=False,
        slow=True,
    ),
    OpCheck(
        "check_op_unseen_keys_do_not_leak",
        "op",
        _unseen_keys_do_not_leak,
        applies=_unless(
            lambda op: op.attends or op.function is ops.paged_attention, "it reads no keys"
        ),
    ),
    OpCheck(
        "check_op_seeing_nothing_is_zero",
        "op",
        _seeing_nothing_is_zero,
        applies=_unless(
            lambda op: op.attends or op.function is ops.paged_attention, "it reads no keys"
        ),
        fixed=lambda op: {"policy": "none", **({"shared": False} if op.attends else {})},
        by_hand=lambda op: [
            replace(case, policy="none", **({"shared": False} if op.attends else {}))
            for case in op.edges
        ],
    ),
    OpCheck(
        "check_op_score_is_the_surprise_of_the_residual",
        "op",
        _score_is_the_surprise_of_the_residual,
        applies=_unless(
            lambda op: op.function is ops.gated_delta_rule, "it gives no score beside a residual"
        ),
    ),
    OpCheck(
        "check_op_raising_tau_never_keeps_more",
        "op",
        _raising_tau_never_keeps_more,
        applies=_unless(lambda op: op.function is ops.select_threshold, "it has no threshold"),
    ),
    OpCheck("check_op_ignores_autocast", "op", _ignores_autocast, by_hand=_small, drawn=False),
]
