from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from budget import Problem, assert_close, assert_close_to_reference
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Attention, Draw, attentions, packs, pieces, seeds
from torch import Tensor

from hamblocks_ops import NEVER, select_threshold, selected_attention

gather = import_module("hamblocks_ops.selected_attention.gather")
IMPLS = ("reference", "gather")
blocks = st.sampled_from([3, 16, 768])


def problem(case: Attention, **options: object) -> Problem:
    return Problem(selected_attention, case.tensors(), options, seed=case.seed)


def in_blocks(size: int) -> Any:
    """Blocks of few queries, so that small cases have several, with tokens that last, pass and end within them."""
    no_shortcuts = {"FEW": 0, "DIRECT": 0} if size <= 16 else {}
    return patch.multiple(gather, BLOCK=size, EDGE=size // 3, **no_shortcuts)


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
        patch.object(gather, "_attend", through(gather._attend)),
        patch.object(gather, "_attend_backward", through(gather._attend_backward)),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None),
    ):
        yield


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16],
    ids=str,
)
@given(data=st.data(), block=blocks)
def test_gather_is_the_reference(dtype: torch.dtype, data: st.DataObject, block: int) -> None:
    with in_blocks(block):
        assert_close_to_reference(problem(data.draw(attentions(dtype=dtype))), "gather")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 0},
        {"tokens": 1, "policy": "all"},
        {"tokens": 1, "policy": "none"},
        {"batch": 0},
        {"tokens": 64, "kv_heads": 1, "policy": "all"},
        {"tokens": 65, "group": 3, "layout": "transposed"},
        {"tokens": 63, "shared": True, "layout": "strided", "bias": "hidden"},
        {"tokens": 130, "policy": "topk", "bias": "some"},
        {"tokens": 130, "policy": "window"},
        {"tokens": 9, "cache": 0},
        {"tokens": 1, "cache": 70, "group": 2, "policy": "all"},
        {"tokens": 33, "cache": 50, "bias": "hidden", "seed": 3},
        {"packed": ()},
        {"packed": (0,)},
        {"packed": (0, 3, 0, 0, 65, 1, 0), "bias": "shared"},
    ],
    ids=str,
)
def test_gather_is_the_reference_at_borders(dtype: torch.dtype, sizes: dict[str, object]) -> None:
    for block in (16, 768):
        with in_blocks(block):
            got = assert_close_to_reference(problem(Attention(dtype=dtype, **sizes)), "gather")
        assert not any(bool(x.isnan().any()) for x in got.values())


def test_bias_in_float32_beside_bfloat16() -> None:
    """The gradient of a router's bias is float32 whatever q, k and v are: no rounding of theirs hides its error."""
    call = Attention(tokens=130, policy="topk", bias="some", dtype=torch.bfloat16).tensors()
    call["logit_bias"] = call["logit_bias"].float()
    assert_close_to_reference(Problem(selected_attention, call), "gather")


@given(case=attentions(), block=blocks)
@example(case=Attention(tokens=40, bias="hidden", group=2), block=16)
def test_arithmetic_of_other_devices_is_the_reference(case: Attention, block: int) -> None:
    with in_blocks(block), arithmetic_of_other_devices():
        assert_close_to_reference(problem(case), "gather")


@given(case=attentions(tokens=st.integers(0, 7), batch=1, dtype=torch.float64))
def test_reference_is_softmax_over_what_is_visible(case: Attention) -> None:
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
            out = v.new_zeros(case.dim) if float(lse) == float("-inf") else logits.softmax(0) @ v[0, seen, g]
            assert torch.allclose(result.lse[0, i, h], lse, rtol=1e-12, atol=1e-12)
            assert torch.allclose(result.out[0, i, h], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attentions(packed=None, cache=None, bias="none", dtype=torch.float64))
@example(case=Attention(tokens=65, group=2))
def test_keeping_everything_is_causal_attention(impl: str, case: Attention) -> None:
    call = case.tensors()
    score = torch.randn(call["k"].shape[:3])
    call["evict_at"] = select_threshold(score, float("-inf"))
    q, k, v = (call[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = selected_attention(**call, impl=impl)
    assert_close(got.out, expected.transpose(1, 2), own=Problem(selected_attention, call).noise()["out"])


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attentions(policy="none", shared=False))
def test_seeing_nothing_is_zero(impl: str, case: Attention) -> None:
    got = problem(case).run(impl)
    assert bool((got.pop("lse") == float("-inf")).all())
    assert not any(bool((x != 0).any()) for x in got.values())


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attentions(), block=blocks, garbage=st.sampled_from([float("nan"), float("inf"), 1e30]))
@example(case=Attention(tokens=9, policy="none"), block=3, garbage=float("nan"))
@example(case=Attention(tokens=33, cache=50, seed=1), block=16, garbage=float("nan"))
def test_what_no_query_sees_does_not_leak(impl: str, case: Attention, block: int, garbage: float) -> None:
    """Never stored, evicted before the first query, beyond key_lengths, hidden by -inf: it may hold anything."""
    clean = problem(case)
    call = dict(clean.tensors)
    seen = _visible(call).any(1)  # [B, Tk, Hkv]
    call |= {name: call[name].masked_fill(~seen[..., None], garbage) for name in ("k", "v")}
    with in_blocks(block):
        got, expected = Problem(selected_attention, call, seed=case.seed).run(impl), clean.run(impl)
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


def _visible(call: dict[str, Tensor]) -> Tensor:
    """The dense mask [B, Tq, Tk, Hkv]."""
    batch, keys, kv_heads = call["k"].shape[:3]
    queries = call["q"].shape[1]
    lengths = call["cu_seqlens"].diff().tolist() if "cu_seqlens" in call else [max(queries, keys)]
    own = torch.tensor([t for n in lengths for t in range(n)], dtype=torch.int64)
    sequence = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    asks = call.get("query_position", own[None, :queries])[:, :, None, None]
    stands = call.get("key_position", own[None, :keys, None])[:, None]
    mask = (stands <= asks) & (asks < call["evict_at"][:, None])
    mask = mask & (sequence[:queries, None] == sequence[:keys])[None, :, :, None]
    if "key_lengths" in call:
        most = call["key_lengths"].unflatten(0, (batch, 1, 1))
        most = most if most.dim() == 4 else most[..., None]
        mask = mask & (torch.arange(keys)[None, None, :, None] < most)
    if "logit_bias" in call:
        mask = mask & (call["logit_bias"] > float("-inf"))[:, None]
    return mask.expand(batch, queries, keys, kv_heads)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attentions(packed=packs, dtype=torch.float64))
@example(case=Attention(packed=(0, 5, 0, 65, 0), bias="some"))
def test_packed_is_one_by_one(impl: str, case: Attention) -> None:
    call = case.tensors()
    whole = selected_attention(**call, impl=impl)
    noise = problem(case).noise()
    for own in pieces(case.packed):
        alone = selected_attention(**{name: x[:, own] for name, x in call.items() if name != "cu_seqlens"}, impl=impl)
        for name in ("out", "lse"):
            assert_close(getattr(whole, name)[:, own], getattr(alone, name), name, own=noise[name])


@pytest.mark.parametrize("impl", IMPLS)
@given(case=attentions(packed=None, cache=None, batch=1, dtype=torch.float64), at=st.floats(0, 1), seed=seeds)
def test_causal(impl: str, case: Attention, at: float, seed: int) -> None:
    """Nothing before t depends on anything from t on: on values up to rounding, on gradients likewise."""
    cut = round(at * case.tokens)
    call, draw = case.tensors(), Draw(seed)
    changed = dict(call)
    for name in ("q", "k", "v", "logit_bias"):
        if name in call:
            changed[name] = torch.cat([call[name][:, :cut], draw.normal(*call[name][:, cut:].shape)], 1)
    later = torch.arange(cut, case.tokens)[None, :, None]
    kept = draw.choice(tuple(call["evict_at"][:, cut:].shape), later.double(), float(NEVER)).to(torch.int32)
    # ends of earlier tokens may change too, as long as they lie at or after t
    past = call["evict_at"][:, :cut]
    past = torch.where(past >= cut, draw.integers(cut, cut + 9, tuple(past.shape)), past).to(torch.int32)
    changed["evict_at"] = torch.cat([past, kept], 1)
    noise = problem(case).noise()
    results = []
    for inputs in (call, changed):
        leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
        result = selected_attention(**leaves, impl=impl)
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        grads = torch.autograd.grad(result.out[:, :cut].sum(), list(wanted.values()), materialize_grads=True)
        assert not any(bool(grad[:, cut:].any()) for grad in grads)
        results.append([result.out[:, :cut], result.lse[:, :cut], *(grad[:, :cut] for grad in grads)])
    for name, one, same in zip(("out", "lse", *wanted), *results, strict=True):
        # gradients are sums over queries of what went into `out`: measured by its noise and the size of the inputs
        size = sum(float(x.double().norm()) for x in call.values() if x.is_floating_point() and x.isfinite().all())
        assert_close(one, same.detach(), name, own=noise["out"] + noise["lse"] + 1e-15 * size**2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cache", [None, 5])
def test_gradcheck(impl: str, cache: int | None) -> None:
    call = Attention(tokens=4, batch=1, cache=cache, group=2, dim=2, bias="some", seed=4).tensors()
    names = ("q", "k", "v", "logit_bias")
    leaves = [call.pop(name).requires_grad_() for name in names]

    def run(*args: Tensor) -> Tensor:
        return selected_attention(**dict(zip(names, args, strict=True)), **call, impl=impl).out

    with in_blocks(3):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_carries_no_gradient(impl: str) -> None:
    call = Attention().tensors()
    assert not selected_attention(**(call | {"q": call["q"].requires_grad_()}), impl=impl).lse.requires_grad


@given(case=attentions(), impl=st.sampled_from(IMPLS))
def test_inputs_stay_and_the_same_call_gives_the_same_bits(case: Attention, impl: str) -> None:
    call = problem(case)
    before = {name: x.clone() for name, x in call.tensors.items()}
    first, second = call.run(impl), call.run(impl)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert all(torch.equal(x, before[name]) for name, x in call.tensors.items())


def products(evict_at: Tensor, dim: int = 8) -> int:
    """How many query-key products `gather` computes."""
    batch, tokens, heads = evict_at.shape
    draw, counted = Draw(0), []
    q, k, v = (draw.normal(batch, tokens, heads, dim, dtype=torch.float32) for _ in range(3))
    attend = gather._attend

    def counting(q: Tensor, k: Tensor, *rest: Any) -> Any:
        counted.append(q.shape[:-1].numel() * k.shape[-2])
        return attend(q, k, *rest)

    with patch.object(gather, "_attend", counting):
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
    [Attention(bias="some"), Attention(packed=(2, 0, 3)), Attention(cache=7), Attention(dtype=torch.bfloat16)],
    ids=["bias", "packed", "cache", "bfloat16"],
)
def test_operators_are_registered_well(case: Attention) -> None:
    call = {"logit_bias": None, "cu_seqlens": None, "query_position": None, "key_position": None, "key_lengths": None}
    checked = import_module("hamblocks_ops.selected_attention")._checked(**(call | case.tensors()), scale=None)
    args = [checked.q, checked.k, checked.v, checked.evict_at, checked.logit_bias]
    args += [checked.query_position, checked.key_position, checked.cu_seqlens]
    differentiable = [x.clone().requires_grad_() if _floating(x) else x for x in args]
    torch.library.opcheck(gather.gather, (*differentiable, checked.scale))
    out, lse = gather.gather(*args, checked.scale)
    checks = ("test_schema", "test_faketensor")  # the backward of the backward is not promised
    torch.library.opcheck(
        gather.gather_backward, (torch.ones_like(out), *args, out, lse, checked.scale), test_utils=checks
    )


def _floating(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


@pytest.mark.parametrize("case", [Attention(bias="hidden"), Attention(packed=(2, 0, 3)), Attention(cache=7)], ids=str)
def test_traces_without_a_break(case: Attention) -> None:
    compiled = torch.compile(selected_attention, fullgraph=True, backend="aot_eager")
    eager = problem(case).run("gather")
    for name, x in Problem(compiled, case.tensors(), seed=case.seed).run("gather").items():
        assert torch.equal(x, eager[name]), name
