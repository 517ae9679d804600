from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import DeltaRuleInputs, Problem, assert_close, delta_rule_inputs
from hamblocks_ops import gated_delta_rule
from hamblocks_ops.gated_delta_rule.reference import reference

IMPLS = ("reference", "chunked")


def problem(case: DeltaRuleInputs, **options: object) -> Problem:
    return Problem(gated_delta_rule, case.tensors(), options, seed=case.seed)


@given(case=delta_rule_inputs(tokens=st.integers(0, 7), packed=None, dtype=torch.float64, heads=1))
def test_reference_is_the_recurrence(case: DeltaRuleInputs) -> None:
    """Against loops over numbers that share no code with it; residual read after the decay and
    before the write."""
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
                    np.testing.assert_allclose(
                        float(result.residual[b, t, h, j]), missed, rtol=1e-12, atol=1e-12
                    )
                    np.testing.assert_allclose(
                        float(result.out[b, t, h, j]), read, rtol=1e-12, atol=1e-12
                    )
            np.testing.assert_allclose(
                result.final_state[b, h].numpy(), state, rtol=1e-12, atol=1e-12
            )


@given(case=delta_rule_inputs(dtype=torch.float64), size=st.integers(1, 80))
@example(case=DeltaRuleInputs(tokens=65, decay="forget", write="any"), size=1)
@example(case=DeltaRuleInputs(packed=(0, 9, 8, 0)), size=8)
def test_chunk_size_does_not_matter(case: DeltaRuleInputs, size: int) -> None:
    per_value_head = import_module("hamblocks_ops.gated_delta_rule.call").per_value_head
    call = per_value_head(gated_delta_rule.call_of(**case.tensors()))
    chunked = import_module("hamblocks_ops.gated_delta_rule.chunked").chunked
    own = problem(case).noise()
    for name, one, other in zip(
        ("out", "residual", "final_state"),
        chunked(**call, chunk_size=size),
        chunked(**call),
        strict=True,
    ):
        assert_close(one, other, name, own=own[name])


@pytest.mark.parametrize("packed", [None, (33, 0, 70, 2)])
def test_groups_of_chunks_do_not_matter(
    packed: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk at a time with the written gradient, against torch's gradient of all at once."""
    case = DeltaRuleInputs(tokens=105, packed=packed, decay="forget", write="any", batch=2)
    tensors = case.tensors()
    given = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    module = import_module("hamblocks_ops.gated_delta_rule.chunked")
    call = gated_delta_rule.call_of(**tensors)
    per_value_head = import_module("hamblocks_ops.gated_delta_rule.call").per_value_head
    wanted = module.chunked(**per_value_head(call))
    monkeypatch.setattr(module, "GROUP", 1)
    got = gated_delta_rule(**tensors, impl="chunked")
    got = got.out, got.residual, got.final_state
    assert got[0].grad_fn is not None
    weights = [torch.randn_like(x) for x in wanted]
    for used in ((0, 1, 2), (0,), (1,), (2,)):
        one, other = (
            torch.autograd.grad(
                [x[n] for n in used],
                given,
                [weights[n] for n in used],
                retain_graph=True,
                materialize_grads=True,
            )
            for x in (got, wanted)
        )
        for x, y in zip((*got, *one), (*wanted, *other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_second_derivatives() -> None:
    tensors = DeltaRuleInputs(tokens=3, batch=1, key_dim=2, value_dim=2, heads=1).tensors()
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        result = gated_delta_rule(**dict(zip(names, given, strict=True)), impl="chunked")
        return result.out, result.residual, result.final_state

    given = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(outputs, given)


def test_score_comes_from_the_residual_before_it_is_rounded() -> None:
    tensors = DeltaRuleInputs(tokens=66, dtype=torch.bfloat16).tensors()
    wide = tensors | {name: tensors[name].float() for name in ("q", "k", "v")}
    narrow = gated_delta_rule(**tensors, metric="cosine", impl="chunked")
    assert narrow.score.dtype == torch.float32
    assert torch.equal(
        narrow.score, gated_delta_rule(**wide, metric="cosine", impl="chunked").score
    )


@given(case=delta_rule_inputs(decay="none", write="mild"), impl=st.sampled_from(IMPLS))
def test_no_decay_is_a_decay_of_one(case: DeltaRuleInputs, impl: str) -> None:
    tensors = case.tensors()
    one = gated_delta_rule(**tensors, impl=impl)
    other = gated_delta_rule(**tensors, g=torch.zeros_like(tensors["beta"]), impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_forgetting_everything_starts_anew(impl: str) -> None:
    """g = -inf at t gives what a sequence that begins at t gives, whatever stood before."""
    tensors = DeltaRuleInputs(tokens=70, decay="none").tensors()
    tensors["g"] = torch.zeros_like(tensors["beta"])
    tensors["g"][:, 30] = float("-inf")
    result = gated_delta_rule(**tensors, impl=impl)
    tail = {name: tensors[name][:, 30:] for name in ("q", "k", "v", "beta")}
    alone = gated_delta_rule(**tail, impl=impl)
    own = Problem(gated_delta_rule, tail).noise()
    assert_close(result.out[:, 30:], alone.out, own=own["out"])


def by_definition(
    tokens: int, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """In bfloat16, v = 0, q = k = 1, no decay."""
    v = torch.zeros(1, tokens, 1, state.shape[3], dtype=torch.bfloat16)
    k = torch.ones(1, tokens, 1, state.shape[2], dtype=torch.bfloat16)
    rate = torch.zeros(1, tokens, 1)
    return reference(
        k, k, v, beta=rate, g=rate, scale=1.0, initial_state=state, cu_seqlens=cu_seqlens
    )


def test_operands_have_the_dtype_of_the_inputs_and_sums_are_float32() -> None:
    """Two columns: a sum that bfloat16 would round, and an operand that it does."""
    state = torch.tensor([[1, 1 / 3], [2**-10, 0]])[None, None]
    expected = torch.tensor([1 + 2**-10, torch.tensor(1 / 3, dtype=torch.bfloat16).item()])
    out, residual, final = by_definition(1, state)
    assert torch.equal(out[0, 0, 0], expected)
    assert torch.equal(residual[0, 0, 0], -expected)
    assert torch.equal(final, state)


def test_the_reference_of_no_tokens_is_as_unrounded_as_that_of_many() -> None:
    state = torch.zeros(0, 1, 2, 2)
    nothing = (
        by_definition(0, state, torch.zeros(1, dtype=torch.int32)),
        by_definition(0, torch.zeros(1, 1, 2, 2)),
    )
    assert all(x.dtype == torch.float32 for results in nothing for x in results)
