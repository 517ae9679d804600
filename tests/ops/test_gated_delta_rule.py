from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from budget import Problem, assert_close, assert_close_to_reference
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DeltaRule, delta_rules, packs, pieces, seeds

from hamblocks_ops import gated_delta_rule, surprise

BY_TOKEN = ("q", "k", "v", "beta", "g")
IMPLS = ("reference", "chunked")


def problem(case: DeltaRule, **options: object) -> Problem:
    return Problem(gated_delta_rule, case.tensors(), options, seed=case.seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(data=st.data(), metric=st.sampled_from([None, "cosine", "relative_l2", "l2"]))
def test_chunked_is_the_reference(dtype: torch.dtype, data: st.DataObject, metric: str | None) -> None:
    case = data.draw(delta_rules(dtype=dtype))
    assert_close_to_reference(problem(case, metric=metric), "chunked")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"batch": 0},
        {"tokens": 63, "heads": 1},
        {"tokens": 64, "group": 3, "layout": "transposed"},
        {"tokens": 65, "decay": "forget", "layout": "strided"},
        {"tokens": 130, "decay": "hard", "write": "any"},
        {"tokens": 65, "write": "zero"},
        {"tokens": 130, "write": "two", "decay": "none"},
        {"tokens": 65, "key_dim": 1, "write": "two", "decay": "none"},
        {"packed": ()},
        {"packed": (0,)},
        {"packed": (0, 3, 0, 0, 65, 1, 0)},
        {"packed": (64, 64), "state": False, "group": 2},
    ],
    ids=str,
)
def test_chunked_is_the_reference_at_borders(dtype: torch.dtype, sizes: dict[str, object]) -> None:
    got = assert_close_to_reference(problem(DeltaRule(dtype=dtype, **sizes), metric="l2"), "chunked")
    assert all(bool(x.isfinite().all()) for x in got.values())


@given(case=delta_rules(tokens=st.integers(0, 7), packed=None, dtype=torch.float64, heads=1))
def test_reference_is_the_recurrence(case: DeltaRule) -> None:
    """Against loops over numbers that share no code with it; residual read after the decay and before the write."""
    tensors = case.tensors()
    result = gated_delta_rule(**tensors, scale=0.5, impl="reference")
    q, k, v, beta = (tensors[name].numpy() for name in ("q", "k", "v", "beta"))
    for b in range(case.batch):
        for h in range(case.group):
            state = np.zeros((case.key_dim, case.value_dim))
            if "initial_state" in tensors:
                state = tensors["initial_state"][b, h].numpy().copy()
            for t in range(case.tokens):
                decay = np.exp(float(tensors["g"][b, t, h])) if "g" in tensors else 1.0
                for j in range(case.value_dim):
                    column = [decay * state[i, j] for i in range(case.key_dim)]
                    predicted = sum(column[i] * k[b, t, 0, i] for i in range(case.key_dim))
                    missed = v[b, t, h, j] - predicted
                    for i in range(case.key_dim):
                        state[i, j] = column[i] + beta[b, t, h] * missed * k[b, t, 0, i]
                    read = 0.5 * sum(state[i, j] * q[b, t, 0, i] for i in range(case.key_dim))
                    np.testing.assert_allclose(float(result.residual[b, t, h, j]), missed, rtol=1e-12, atol=1e-12)
                    np.testing.assert_allclose(float(result.out[b, t, h, j]), read, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(result.final_state[b, h].numpy(), state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=delta_rules(packed=st.none(), dtype=torch.float64), at=st.floats(0, 1))
@example(case=DeltaRule(tokens=0), at=0)
@example(case=DeltaRule(tokens=1), at=1)
@example(case=DeltaRule(tokens=128), at=0.5)
def test_splitting_with_the_state_handed_over(impl: str, case: DeltaRule, at: float) -> None:
    tensors = case.tensors()
    cut = round(at * case.tokens)
    whole = gated_delta_rule(**tensors, metric="l2", impl=impl)
    own = problem(case, metric="l2").noise()
    state, parts = tensors.pop("initial_state", None), []
    for piece in (slice(0, cut), slice(cut, case.tokens)):
        part = {name: x[:, piece] for name, x in tensors.items()}
        parts.append(gated_delta_rule(**part, initial_state=state, metric="l2", impl=impl))
        state = parts[-1].final_state
    for name in ("out", "residual", "score"):
        assert_close(torch.cat([getattr(x, name) for x in parts], 1), getattr(whole, name), name, own=own[name])
    assert_close(state, whole.final_state, "final_state", own=own["final_state"])


@pytest.mark.parametrize("impl", IMPLS)
@given(case=delta_rules(packed=packs, dtype=torch.float64))
@example(case=DeltaRule(packed=(0, 0, 5, 0, 65, 0)))
def test_packed_is_one_by_one(impl: str, case: DeltaRule) -> None:
    tensors = case.tensors()
    whole = gated_delta_rule(**tensors, metric="l2", impl=impl)
    own = problem(case, metric="l2").noise()
    for n, piece in enumerate(pieces(case.packed)):
        alone = {name: tensors[name][:, piece] for name in BY_TOKEN if name in tensors}
        if "initial_state" in tensors:
            alone["initial_state"] = tensors["initial_state"][n : n + 1]
        result = gated_delta_rule(**alone, metric="l2", impl=impl)
        for name in ("out", "residual", "score"):
            assert_close(getattr(whole, name)[:, piece], getattr(result, name), name, own=own[name])
        assert_close(whole.final_state[n], result.final_state[0], "final_state", own=own["final_state"])


@pytest.mark.parametrize("impl", IMPLS)
@given(case=delta_rules(tokens=st.integers(1, 70), packed=None, batch=1), at=st.floats(0, 1), seed=seeds)
@example(case=DeltaRule(tokens=65, batch=1, decay="forget"), at=0.99, seed=1)
def test_causal(impl: str, case: DeltaRule, at: float, seed: int) -> None:
    """Nothing before t depends on anything from t on, to the bit; nor do gradients of what stands before it."""
    cut = round(at * (case.tokens - 1))
    tensors = case.tensors()
    other = DeltaRule(**(case.__dict__ | {"seed": seed + 1})).tensors()
    changed = {
        name: torch.cat([x[:, :cut], other[name][:, cut:]], 1) if name in BY_TOKEN else x for name, x in tensors.items()
    }
    before = []
    for inputs in (tensors, changed):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        result = gated_delta_rule(**leaves, metric="cosine", impl=impl)
        past = result.out[:, :cut].float().sum() + result.residual[:, :cut].float().square().sum()
        grads = torch.autograd.grad(past, list(leaves.values()), materialize_grads=True)
        before.append([result.out[:, :cut], result.residual[:, :cut], result.score[:, :cut]])
        for name, grad in zip(leaves, grads, strict=True):
            if name in BY_TOKEN:
                assert not grad[:, cut:].any(), f"grad of {name} from t on"
                grad = grad[:, :cut]
            before[-1].append(grad)
    for one, same in zip(*before, strict=True):
        assert torch.equal(one, same)


@given(case=delta_rules(dtype=torch.float64), size=st.integers(1, 80))
@example(case=DeltaRule(tokens=65, decay="forget", write="any"), size=1)
@example(case=DeltaRule(packed=(0, 9, 8, 0)), size=8)
def test_chunk_size_does_not_matter(case: DeltaRule, size: int) -> None:
    module = import_module("hamblocks_ops.gated_delta_rule")
    tensors = {"g": None, "initial_state": None, "cu_seqlens": None} | case.tensors()
    call = module._tensors(module._checked(**tensors, scale=None, output_residual=True, metric=None))
    chunked = import_module("hamblocks_ops.gated_delta_rule.chunked").chunked
    own = problem(case).noise()
    for name, one, other in zip(
        ("out", "residual", "final_state"), chunked(**call, chunk_size=size), chunked(**call), strict=True
    ):
        assert_close(one, other, name, own=own[name])


@pytest.mark.parametrize("impl", IMPLS)
@given(
    case=delta_rules(dtype=st.sampled_from([torch.float64, torch.float32])),
    metric=st.sampled_from(["cosine", "relative_l2", "l2"]),
)
def test_score_is_the_surprise_of_the_residual(impl: str, case: DeltaRule, metric: str) -> None:
    tensors = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in case.tensors().items()}
    result = gated_delta_rule(**tensors, metric=metric, impl=impl)
    assert not result.score.requires_grad
    assert torch.equal(result.score, surprise(result.residual.detach(), tensors["v"].detach(), metric=metric))
    without = gated_delta_rule(**tensors, metric=metric, output_residual=False, impl=impl)
    assert without.residual is None
    assert torch.equal(without.score, result.score)


def test_score_comes_from_the_residual_before_it_is_rounded() -> None:
    tensors = DeltaRule(tokens=66, dtype=torch.bfloat16).tensors()
    wide = tensors | {name: tensors[name].float() for name in ("q", "k", "v")}
    narrow = gated_delta_rule(**tensors, metric="cosine", impl="chunked")
    assert narrow.score.dtype == torch.float32
    assert torch.equal(narrow.score, gated_delta_rule(**wide, metric="cosine", impl="chunked").score)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [None, (1, 0, 2)], ids=str)
def test_gradcheck(impl: str, packed: tuple[int, ...] | None) -> None:
    tensors = DeltaRule(tokens=3, batch=1, packed=packed, heads=1, group=2, key_dim=2, value_dim=2).tensors()
    borders = tensors.pop("cu_seqlens", None)
    q, k, v, *rest = (x.requires_grad_() for x in tensors.values())

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(tensors, args, strict=True))
        return gated_delta_rule(**named, cu_seqlens=borders, impl=impl)[:3]

    assert torch.autograd.gradcheck(run, (q, k, v, *rest), fast_mode=False)


@given(case=delta_rules(decay="none", write="mild"), impl=st.sampled_from(IMPLS))
def test_no_decay_is_a_decay_of_one(case: DeltaRule, impl: str) -> None:
    tensors = case.tensors()
    one = gated_delta_rule(**tensors, impl=impl)
    other = gated_delta_rule(**tensors, g=torch.zeros_like(tensors["beta"]), impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_forgetting_everything_starts_anew(impl: str) -> None:
    """g = -inf at t gives what a sequence that begins at t gives, whatever stood before."""
    tensors = DeltaRule(tokens=70, decay="none").tensors()
    tensors["g"] = torch.zeros_like(tensors["beta"])
    tensors["g"][:, 30] = float("-inf")
    result = gated_delta_rule(**tensors, impl=impl)
    tail = {name: tensors[name][:, 30:] for name in ("q", "k", "v", "beta")}
    alone = gated_delta_rule(**tail, impl=impl)
    own = Problem(gated_delta_rule, tail).noise()
    assert_close(result.out[:, 30:], alone.out, own=own["out"])


@given(case=delta_rules(), impl=st.sampled_from(IMPLS))
@example(case=DeltaRule(tokens=65, layout="strided"), impl="chunked")
def test_inputs_stay_and_the_same_call_gives_the_same_bits(case: DeltaRule, impl: str) -> None:
    call = problem(case, metric="cosine")
    before = {name: x.clone() for name, x in call.tensors.items()}
    first, second = call.run(impl), call.run(impl)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert all(torch.equal(x, before[name]) for name, x in call.tensors.items())


def test_autocast_does_not_reach_inside() -> None:
    tensors = DeltaRule(tokens=66, dtype=torch.float32).tensors()
    expected = gated_delta_rule(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gated_delta_rule(**tensors)
    assert all(torch.equal(x, y) for x, y in zip(expected[:3], result[:3], strict=True))


@pytest.mark.parametrize("case", [DeltaRule(tokens=65), DeltaRule(packed=(0, 2))], ids=["plain", "packed"])
def test_traces_without_a_break(case: DeltaRule) -> None:
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    assert_close_to_reference(Problem(_either(gated_delta_rule, compiled), case.tensors(), {"metric": "l2"}), "chunked")


def _either(eager: Callable[..., Any], traced: Callable[..., Any]) -> Callable[..., Any]:
    """The reference stays eager: traced, its loop over tokens would be a graph of thousands of nodes."""
    return lambda impl, **call: (eager if impl == "reference" else traced)(impl=impl, **call)
