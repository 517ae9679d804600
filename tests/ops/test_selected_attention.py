from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import (
    AttentionInputs,
    Draw,
    OpImplementation,
    Problem,
    assert_close,
    assert_close_to_reference,
    attention_inputs,
    parametrize_with_checks,
)
from hamblocks_ops import (
    NEVER,
    compact,
    select_threshold,
    select_window,
    selected_attention,
)
from hamblocks_ops.selected_attention.reference import reference

gather = import_module("hamblocks_ops.selected_attention.gather")
forward, backward, plan, operands = (
    import_module(f"hamblocks_ops.selected_attention.gather.{name}")
    for name in ("forward", "backward", "plan", "operands")
)
IMPLS = ("reference", "gather")
blocks = st.sampled_from([3, 16, 768])


def problem(case: AttentionInputs, **options: object) -> Problem:
    return Problem(selected_attention, case.tensors(), options, seed=case.seed)


@contextmanager
def in_blocks(size: int) -> Iterator[None]:
    """Blocks of few queries, so that small cases have several, with tokens that last, pass and end
    within them."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(operands, "BLOCK_QUERIES", size))
        patches.enter_context(patch.object(plan, "EDGE_QUERIES", size // 3))
        if size <= 16:  # without shortcuts
            patches.enter_context(patch.object(plan, "SMALL_PART_KEYS", 0))
            patches.enter_context(patch.object(forward, "DIRECT_MAX_QUERIES", 0))
        yield


@contextmanager
def arithmetic_of_other_devices() -> Iterator[None]:
    """Has `gather` take the branch that it takes for tensors that are not on the CPU."""

    class Elsewhere(Tensor):
        device = torch.device("meta")

    def through(function: Any) -> Any:
        def call(*args: Any) -> Any:
            moved = [x.as_subclass(Elsewhere) if isinstance(x, Tensor) else x for x in args]
            return tuple(x.as_subclass(Tensor) for x in function(*moved))

        return call

    with (
        patch.object(forward, "attend", through(forward.attend)),
        patch.object(backward, "attend_backward", through(backward.attend_backward)),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None),
    ):
        yield


@pytest.mark.slow
@parametrize_with_checks(ops=[OpImplementation(selected_attention, impl="gather")])
def test_in_small_blocks(check: Any) -> None:
    """So small that the drawn cases have several."""
    with in_blocks(3):
        check()


def test_bias_in_float32_beside_bfloat16() -> None:
    """The gradient of a router's bias is float32 whatever q, k and v are: no rounding of theirs
    hides its error."""
    call = AttentionInputs(tokens=130, policy="topk", bias="some", dtype=torch.bfloat16).tensors()
    call["logit_bias"] = call["logit_bias"].float()
    assert_close_to_reference(Problem(selected_attention, call), "gather")


@given(case=attention_inputs(), block=blocks)
@example(case=AttentionInputs(tokens=40, bias="hidden", group=2), block=16)
def test_arithmetic_of_other_devices_is_the_reference(case: AttentionInputs, block: int) -> None:
    with in_blocks(block), arithmetic_of_other_devices():
        assert_close_to_reference(problem(case), "gather")


@given(case=attention_inputs(tokens=st.integers(0, 7), batch=1, dtype=torch.float64))
def test_reference_is_softmax_over_what_is_visible(case: AttentionInputs) -> None:
    """Against one softmax per query over a list of visible keys."""
    call = case.tensors()
    q, k, v = call["q"], call["k"], call["v"]
    keys, kv_heads = k.shape[1:3]
    own = torch.cat([torch.arange(n) for n in (*(case.packed or (q.shape[1],)), 0)])
    sequence = [n for n, length in enumerate(case.packed or (q.shape[1],)) for _ in range(length)]
    asks = call["query_position"][0] if "query_position" in call else own
    stands = call.get("key_position", own[None, :, None])[0].expand(keys, kv_heads)
    until, bias = call["evict_at"][0].expand(keys, kv_heads), call.get("logit_bias")
    there = call["key_lengths"][0].expand(kv_heads) if "key_lengths" in call else [keys] * kv_heads
    result = selected_attention(**call, scale=0.7, impl="reference")
    for i in range(q.shape[1]):
        for h in range(q.shape[2]):
            g = h // case.group
            seen = [
                j
                for j in range(keys)
                if stands[j, g] <= asks[i] < until[j, g]
                and j < there[g]
                and (case.packed is None or sequence[i] == sequence[j])
            ]
            logits = 0.7 * k[0, seen, g] @ q[0, i, h]
            if bias is not None:
                logits = logits + bias[0].expand(keys, kv_heads)[seen, g]
            lse = logits.logsumexp(0) if seen else torch.tensor(float("-inf"), dtype=torch.float64)
            out = (
                v.new_zeros(case.dim)
                if float(lse) == float("-inf")
                else logits.softmax(0) @ v[0, seen, g]
            )
            assert torch.allclose(result.lse[0, i, h], lse, rtol=1e-12, atol=1e-12)
            assert torch.allclose(result.out[0, i, h], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attention_inputs(packed=None, cache=None, bias="none", dtype=torch.float64))
@example(case=AttentionInputs(tokens=65, group=2))
def test_keeping_everything_is_causal_attention(impl: str, case: AttentionInputs) -> None:
    call = case.tensors()
    score = torch.randn(call["k"].shape[:3])
    call["evict_at"] = select_threshold(score, float("-inf"))
    q, k, v = (call[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    got = selected_attention(**call, impl=impl)
    assert_close(
        got.out, expected.transpose(1, 2), own=Problem(selected_attention, call).noise()["out"]
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_carries_no_gradient(impl: str) -> None:
    call = AttentionInputs().tensors()
    assert not selected_attention(
        **(call | {"q": call["q"].requires_grad_()}), impl=impl
    ).lse.requires_grad


def products(evict_at: Tensor, dim: int = 8) -> int:
    """How many query-key products `gather` computes."""
    batch, tokens, heads = evict_at.shape
    draw, counted = Draw(0), []
    q, k, v = (draw.normal(batch, tokens, heads, dim, dtype=torch.float32) for _ in range(3))
    attend = forward.attend

    def counting(q: Tensor, k: Tensor, *rest: Any) -> Any:
        counted.append(q.shape[:-1].numel() * k.shape[-2])
        return attend(q, k, *rest)

    with patch.object(forward, "attend", counting):
        selected_attention(q, k, v, evict_at, impl="gather")
    return sum(counted)


TOKENS = 4096
ALL = float("-inf")


def uniform_scores(heads: int) -> Tensor:
    """The share of them above 1 - f is f."""
    return torch.rand(1, TOKENS, heads, generator=torch.Generator().manual_seed(0))


def test_cost_follows_what_is_kept() -> None:
    score = uniform_scores(2)
    everything = products(select_threshold(score, ALL))
    assert everything <= 1.25 * score.shape[2] * TOKENS**2 / 2  # causal: about half of the square
    for fraction in (0.5, 0.25, 0.1):
        assert products(select_threshold(score, 1 - fraction)) <= (fraction + 0.05) * everything


def test_a_head_that_keeps_everything_does_not_charge_the_others() -> None:
    score = uniform_scores(4)
    everything = products(select_threshold(score, ALL)) / 4
    done = products(select_threshold(score, torch.tensor([ALL, 0.9, 0.9, 0.9])))
    assert done <= (1 + 3 * (0.1 + 0.05)) * everything


@pytest.mark.parametrize(
    "case",
    [
        AttentionInputs(bias="some"),
        AttentionInputs(packed=(2, 0, 3)),
        AttentionInputs(cache=7),
        AttentionInputs(dtype=torch.bfloat16),
    ],
    ids=["bias", "packed", "cache", "bfloat16"],
)
def test_operators_are_registered_well(case: AttentionInputs) -> None:
    checked = selected_attention.call_of(**case.tensors())
    args = [checked.q, checked.k, checked.v, checked.evict_at, checked.logit_bias]
    args += [checked.query_position, checked.key_position, checked.cu_seqlens]
    differentiable = [x.clone().requires_grad_() if _floating(x) else x for x in args]
    torch.library.opcheck(gather.gather, (*differentiable, checked.scale))
    out, lse = gather.gather(*args, checked.scale)
    checks = ("test_schema", "test_faketensor")  # the backward of the backward is not promised
    torch.library.opcheck(
        gather.gather_backward,
        (torch.ones_like(out), *args, out, lse, checked.scale),
        test_utils=checks,
    )


def _floating(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def ones(*logits: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """One query, the last, that asks 1 of keys that answer with these logits; the first value is 3,
    the others 0."""
    k = torch.tensor(logits)[None, :, None, None].to(dtype)
    v = torch.zeros_like(k)
    v[:, 0] = 3
    return torch.ones_like(k), k, v


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_far_below_zero_are_told_apart(impl: str) -> None:
    q, k, v = ones(-1000.0, -1000.0, -2000.0)
    lasting = torch.full((1, 3, 1), NEVER, dtype=torch.int32)
    result = selected_attention(q, k, v, lasting, scale=1.0, impl=impl)
    assert result.out[0, -1].item() == pytest.approx(1.5, rel=1e-6)
    assert result.lse[0, -1].item() == pytest.approx(-1000.0, rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_int64_beyond_int32_means_the_end_of_int32(impl: str) -> None:
    """Cast to int32 alone, the largest int64 would be -1: a token that is never stored."""
    q, k, v = ones(0.0, 0.0, 0.0)
    end = torch.full((1, 3, 1), torch.iinfo(torch.int64).max)
    seen = selected_attention(q, k, v, end, impl=impl)
    assert torch.equal(seen.lse[0, :, 0].exp().round(), torch.tensor([1.0, 2.0, 3.0]))
    there = {"key_position": torch.tensor([[0, 1, 2**32]])}
    later = selected_attention(q, k, v, end, query_position=torch.tensor([[0, 1, 2]]), **there)
    assert torch.equal(later.lse[0, :, 0].exp().round(), torch.tensor([1.0, 2.0, 2.0]))
    assert compact(end).evict_at.flatten().tolist() == [NEVER] * 3
    far = torch.tensor([[2**31 - 2, 2**31, 2**40]])
    assert select_window(v[..., 0], 1, position=far).flatten().tolist() == [NEVER] * 3


def by_definition(logit_bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v = ones(0.0, 0.0, 0.0, **options)
    place = torch.arange(3)
    lasting = torch.full((1, 3, 1), NEVER)
    return reference(
        q,
        k,
        v,
        lasting,
        scale=1.0,
        logit_bias=logit_bias,
        query_position=place[None],
        key_position=place[None, :, None],
        cu_seqlens=None,
    )


def test_shares_are_rounded_to_the_dtype_of_the_inputs() -> None:
    """As the operands of a tensor core are; the sum is not."""
    out, _ = by_definition(dtype=torch.bfloat16)
    assert out[0, -1].item() == 3 * torch.tensor(1 / 3, dtype=torch.bfloat16).item() != 1


def test_a_wider_bias_does_not_widen_the_arithmetic() -> None:
    for result in by_definition(logit_bias=torch.zeros(1, 3, 1, dtype=torch.float64)):
        assert result.dtype == torch.float32
