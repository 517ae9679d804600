"""Checks of ops: each implementation against the reference, and what every call promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hamblocks_ops as ops
from hamblocks.testing.budget import assert_bits, assert_close_to_reference, assert_same
from hamblocks.testing.check import Options
from hamblocks.testing.comparing import (
    assert_never_longer,
    assert_reads_what_was_written,
    assert_twice,
    compiled,
    prefixed,
    unchanged,
)
from hamblocks.testing.inputs.draw import pieces, placing, ragged_lengths
from hamblocks.testing.inputs.ops import Calls, metric_of
from hamblocks.testing.inputs.paged import PagedInputs
from hamblocks.testing.kinds.op_cases import (
    OpCheck,
    in_float64,
    packed_cases,
    plain,
    refused_dtypes,
    whole,
)
from hamblocks.testing.ops import OpImplementation

Results = dict[str, Tensor]
INF, NAN = float("inf"), float("nan")


def _is_the_reference(part: OpImplementation, case: Any, _options: Options) -> None:
    """Results and gradients are as right as the reference: see assert_close_to_reference."""
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
    """Results of the reference for these inputs, to measure how much rounding changes them."""
    return lambda: cut(part.problem(case, tensors).run("reference", backward=False))


def _is_causal(part: OpImplementation, case: Any, _options: Options) -> None:
    """Inputs from position t on change no result before t, and get no gradient from one."""
    tensors = case.tensors()
    t = case.seed % (case.tokens + 1)
    other = replace(case, seed=case.seed + 1).tensors()
    changed = {
        name: torch.cat([x[:, :t], other[name][:, t:]], 1) if name in part.hints.by_token else x
        for name, x in tensors.items()
    }

    def before(results: Results) -> Results:
        early = {
            name: x[:, :t] for name, x in results.items() if name not in part.hints.by_sequence
        }
        if early.keys() == {"result"} and not early["result"].is_floating_point():
            early["result"] = early["result"].clamp(max=t)
        return early

    with prefixed(f"results before position {t} changed with the inputs from it on"):
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
        if x is not None and x.requires_grad and name not in part.hints.by_sequence
    ]
    wanted = {
        name: x for name, x in leaves.items() if x.requires_grad and name in part.hints.by_token
    }
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
    """Packed sequences give what each gives alone; empty sequences change nothing."""
    tensors, hints = case.tensors(), part.hints
    whole = _results(part, case, tensors)
    alone = []
    for n, own in enumerate(pieces(case.packed)):
        one = {name: x[:, own] for name, x in tensors.items() if name in hints.by_token}
        if hints.streams is not None and hints.streams[0] in tensors:
            one[hints.streams[0]] = tensors[hints.streams[0]][n : n + 1]
        alone.append(_results(part, case, one))
    expected = {}
    for name, x in whole.items():
        if name not in hints.lists:
            dim = 0 if name in hints.by_sequence else 1
            expected[name] = torch.cat(
                [x.narrow(dim, 0, 0), *(results[name] for results in alone)], dim
            )
    got = {name: whole[name] for name in expected}
    with prefixed("a sequence alone gives another result than packed"):
        assert_same(
            got,
            expected,
            _noise(part, case, tensors, lambda results: {name: results[name] for name in got}),
        )


def _any_split_is_one_pass(part: OpImplementation, case: Any, _options: Options) -> None:
    """Two pieces with the state handed over give what one pass gives."""
    assert part.hints.streams is not None
    takes, gives = part.hints.streams
    tensors = case.tensors()
    cut = case.seed % (case.tokens + 1)
    whole = _results(part, case, tensors)
    parts, state = [], tensors.get(takes)
    for own in (slice(0, cut), slice(cut, None)):
        piece = {name: x[:, own] for name, x in tensors.items() if name in part.hints.by_token}
        parts.append(_results(part, case, piece | ({} if state is None else {takes: state})))
        state = parts[-1][gives]
    got = {
        name: state if name == gives else torch.cat([one[name] for one in parts], 1)
        for name in whole
    }
    with prefixed(
        f"pieces of {cut} and {case.tokens - cut} tokens give another result than one pass"
    ):
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
    """Zeros, nothing kept or all forgotten: results and gradients are finite (lse: or -inf)."""
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
    with prefixed("gradients differ from finite differences"):
        torch.autograd.gradcheck(run, given, fast_mode=True)


def _compiled_is_eager(part: OpImplementation, case: Any, _options: Options) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, forward and backward."""
    eager = part.problem(case)
    with compiled(part.run or part.like) as fast:
        traced = replace(part, run=fast if part.run is not None else _named(fast, part))
        results = traced.problem(case).run("it")
    with prefixed("compiled and eager differ"):
        assert_same(results, eager.run("it"), lambda: eager.run("reference"))


def _named(fast: Callable[..., Any], part: OpImplementation) -> Callable[..., Any]:
    more = {"impl": part.impl} if ops.implementations(part.like) else {}
    return lambda *args, **call: fast(*args, **call, **more)


def _unseen_keys_do_not_leak(part: OpImplementation, case: Any, _options: Options) -> None:
    """Keys that are never stored, evicted before the first query or hidden may be anything."""
    if isinstance(case, PagedInputs):
        clean = part.problem(replace(case, garbage=None)).run("it")
        for garbage in (NAN, INF, 6e4):
            with prefixed(f"{garbage} where no query sees it changed the result"):
                assert_bits(part.problem(replace(case, garbage=garbage)).run("it"), clean)
        return
    tensors = case.tensors()
    unseen = ~visible(tensors).any(1)[..., None]

    def with_garbage(value: float) -> Results:
        # the clean call is made in the same way, because other strides may round differently
        filled = {name: tensors[name].masked_fill(unseen, value) for name in ("k", "v")}
        return _results(part, case, tensors | filled, backward=True)

    clean = with_garbage(0.0)
    for garbage in (NAN, INF, 1e30):
        with prefixed(f"{garbage} where no query sees it changed the result"):
            assert_bits(with_garbage(garbage), clean)


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
    """The score is that of the unrounded residual, detached, also without the residual."""
    tensors = {
        name: x.clone().requires_grad_(x.is_floating_point()) for name, x in case.tensors().items()
    }
    metric = metric_of(case)["metric"]
    result, without = (
        part(**tensors, metric=metric, output_residual=told_too) for told_too in (True, False)
    )
    assert not result.score.requires_grad, "score: carries a gradient, expected none"
    assert without.residual is None, "residual: written out, expected None"
    with prefixed("the score differs without the residual"):
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
    with prefixed("autocast changed the result"):
        assert_bits(results, expected)


def _raising_tau_never_keeps_more(part: OpImplementation, case: Any, _options: Options) -> None:
    """On the same scores, a higher threshold ends no lifetime later."""
    tensors, name = case.tensors(), str(part.hints.threshold)
    kept = [part(**tensors, **{name: tau}) for tau in (-INF, -1.0, 0.0, 0.25, 0.5, INF)]
    assert_never_longer(kept)


def _if(hint: str, reason: str = "") -> Callable[[Any, Options], str | None]:
    """Applies if a hint of the op holds; otherwise the reason is the hint, or `reason`."""

    def applies(part: OpImplementation, _options: Options) -> str | None:
        value = getattr(part.hints, hint)
        return None if value and (value is True or reason) else value or reason

    return applies


def _not_traced(part: OpImplementation, _options: Options) -> str | None:
    # The length of a list depends on values in every implementation. Other reasons apply only to
    # the implementations of this package.
    if part.hints.traced is not True and (part.run is None or part.hints.lists):
        return part.hints.traced
    return (
        "the reference is written to be read, not to be traced"
        if part.impl == "reference"
        else None
    )


def _in(dtype: torch.dtype) -> OpCheck:
    name = str(dtype).removeprefix("torch.")
    return OpCheck(
        f"check_op_{name}_is_the_reference",
        "op",
        _is_the_reference,
        applies=lambda part, options: (
            refused_dtypes(part).get(dtype)
            if dtype in (*options.dtypes, torch.float16) and dtype in part.op.dtypes
            else f"it does not compute in {name}"
        ),
        fixed=lambda op: {} if "dtype" not in op.fields else {"dtype": dtype},
        long_in=dtype,
        by_hand=lambda op: [
            replace(case, dtype=dtype) if "dtype" in op.fields else case for case in op.edges
        ],
    )


def _small(op: Calls) -> list[Any]:
    """Cases for the checks that run only one or two."""
    return list(op.small or op.edges[2:3])


CHECKS: list[OpCheck] = [
    _in(torch.float64),
    _in(torch.float32),
    _in(torch.bfloat16),
    _in(torch.float16),
    OpCheck(
        "check_op_is_causal",
        "op",
        _is_causal,
        applies=_if("causal"),
        fixed=plain,
        by_hand=whole,
    ),
    OpCheck(
        "check_op_packed_is_one_by_one",
        "op",
        _packed_is_one_by_one,
        applies=_if("packs"),
        fixed=lambda op: in_float64(op, packed=ragged_lengths(20, 5), cache=None),
        by_hand=packed_cases,
    ),
    OpCheck(
        "check_op_any_split_is_one_pass",
        "op",
        _any_split_is_one_pass,
        applies=_if("streams", "it hands no state on"),
        fixed=plain,
        by_hand=lambda op: [replace(case, seed=seed) for case in whole(op) for seed in (0, 64)],
    ),
    OpCheck("check_op_same_call_same_bits", "op", _same_call_same_bits, share=2),
    OpCheck("check_op_nothing_given_changes", "op", _nothing_given_changes, share=2),
    OpCheck("check_op_reads_no_unwritten_memory", "op", _reads_no_unwritten_memory, share=2),
    OpCheck(
        "check_op_is_always_finite",
        "op",
        _is_always_finite,
        applies=lambda part, _options: None if part.op.degenerate else "its results are integers",
        by_hand=lambda op: op.degenerate,
        drawn=False,
    ),
    OpCheck(
        "check_op_gradients_are_right",
        "op",
        _gradients_are_right,
        applies=lambda part, _options: (
            refused_dtypes(part).get(torch.float64)
            if part.hints.differentiable
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
        applies=_if("attends", "it reads no keys"),
    ),
    OpCheck(
        "check_op_seeing_nothing_is_zero",
        "op",
        _seeing_nothing_is_zero,
        applies=_if("attends", "it reads no keys"),
        fixed=lambda op: {"policy": "none", **({"shared": False} if "shared" in op.fields else {})},
        by_hand=lambda op: [
            replace(case, policy="none", **({"shared": False} if "shared" in op.fields else {}))
            for case in op.edges
        ],
    ),
    OpCheck(
        "check_op_score_is_the_surprise_of_the_residual",
        "op",
        _score_is_the_surprise_of_the_residual,
        applies=_if("scores_residual", "it gives no score beside a residual"),
    ),
    OpCheck(
        "check_op_raising_tau_never_keeps_more",
        "op",
        _raising_tau_never_keeps_more,
        applies=_if("threshold", "it has no threshold"),
    ),
    OpCheck("check_op_ignores_autocast", "op", _ignores_autocast, by_hand=_small, drawn=False),
]
