"""FlashAttention over ragged keys; it has no kernel for a CPU: a torch function of the same meaning
stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import AttentionInputs, OpImplementation, assert_close, attention_inputs
from hamblocks.testing.kinds.ops import visible
from hamblocks_ops import UnsupportedError, explain, selected_attention

flash = import_module("hamblocks_ops.selected_attention.flash")
VARLEN, WITHOUT = flash.varlen, flash.without_flash
PART = OpImplementation(selected_attention, impl="flash")


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_borders: Tensor,
    k_borders: Tensor,
    most: tuple[int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What FlashAttention computes: each sequence alone, causal from the bottom right; a row of
    none is 0 and +inf."""
    outs, sums = [], []
    lengths = [x.diff().max() for x in (q_borders, k_borders)]
    assert most == (int(lengths[0]), int(lengths[1]))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for own, other in zip(pairwise(q_borders.tolist()), pairwise(k_borders.tolist()), strict=True):
        a, b, c = q[slice(*own)].to(wide), k[slice(*other)].to(wide), v[slice(*other)].to(wide)
        logits = scale * torch.einsum("ihd,jud->hij", a, b)
        if causal:
            i, j = torch.arange(len(a))[:, None], torch.arange(len(b))
            logits = logits.masked_fill(j > i + len(b) - len(a), float("-inf"))
        lse = logits.logsumexp(2)
        weight = (logits - lse[..., None]).exp().nan_to_num()
        outs.append(torch.einsum("hij,jud->ihd", weight.to(q.dtype).to(wide), c).to(q.dtype))
        sums.append(lse.masked_fill(lse == float("-inf"), float("inf")))
    return torch.cat(outs), torch.cat(sums, 1)


@pytest.fixture(autouse=True, scope="module")
def _kernel() -> Iterator[None]:
    with patch.multiple(flash, varlen=ragged, without_flash=lambda _: None, BLOCK_QUERIES=7):
        yield


@settings(max_examples=60)
@given(case=attention_inputs(bias="none", tokens=st.integers(0, 40)))
@example(case=AttentionInputs(tokens=65, group=3, policy="window"))
@example(case=AttentionInputs(packed=(0, 3, 0, 0, 30, 1, 0)))
@example(case=AttentionInputs(tokens=1, cache=70, group=2, policy="all"))
@example(case=AttentionInputs(tokens=1, cache=70, group=2, seed=3))
@example(case=AttentionInputs(tokens=33, cache=50))
@example(case=AttentionInputs(tokens=40, policy="all", group=2))
def test_inference_is_the_reference(case: AttentionInputs) -> None:
    problem = PART.problem(case)
    exact, own = problem.run("reference", dtype=torch.float64, backward=False), problem.noise()
    plain = problem.run("reference", backward=False)
    for name, x in problem.run("it", backward=False).items():
        error = float((plain[name].double() - exact[name]).nan_to_num().norm())
        assert x.dtype == plain[name].dtype
        assert_close(x, exact[name], name, own=max(2 * error, 2 * own[name]))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_is_not_seen_does_not_leak(garbage: float) -> None:
    for case in (
        AttentionInputs(tokens=20),
        AttentionInputs(tokens=6, cache=20),
        AttentionInputs(tokens=1, cache=9),
    ):
        tensors = case.tensors()
        unseen = ~visible(tensors).any(1)[..., None]
        found = []
        for value in (garbage, 0.0):
            filled = {x: tensors[x].masked_fill(unseen, value) for x in ("k", "v")}
            found.append(selected_attention(**tensors | filled, impl="flash"))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def kept(tokens: int, fraction: float, prefix: int = 0) -> dict[str, Any]:
    """The queries are the stored tokens of a sequence of some length; `prefix` of the first ask
    nothing any more."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(tokens)[None, torch.rand(tokens, generator=generator) < fraction]
    count = position.shape[1]
    shape = 1, count, 2, 8
    q, k, v = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    )
    evict_at = torch.full((1, count, 1), 2**31 - 1)
    return {
        "q": q[:, prefix:], "k": k, "v": v, "evict_at": evict_at,
        "query_position": position[:, prefix:], "key_position": position,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 5])
def test_queries_that_are_the_stored_tokens_have_a_gradient(prefix: int) -> None:
    call = kept(40, 0.5, prefix)
    assert not explain(selected_attention, **call)["flash"].startswith("it has")
    results = []
    for impl in ("flash", "reference"):
        with patch.object(flash, "_block", None):  # it is one call
            out, lse = selected_attention(**call, impl=impl)
        results.append(
            [
                out,
                lse,
                *torch.autograd.grad(out.sin().sum(), [call[name] for name in ("q", "k", "v")]),
            ]
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_other_queries_have_none() -> None:
    call = AttentionInputs(tokens=9, policy="window").tensors()
    call["q"].requires_grad_()
    with pytest.raises(
        UnsupportedError, match="only where the queries are the last of the stored tokens"
    ):
        selected_attention(**call, impl="flash")
    with torch.no_grad():
        assert bool(selected_attention(**call, impl="flash").out.isfinite().all())


@settings(max_examples=100)
@given(
    case=attention_inputs(bias="none", tokens=st.integers(1, 6), packed=None, dtype=torch.float64)
)
@example(case=AttentionInputs(tokens=5, policy="all"))
@example(case=AttentionInputs(tokens=3, cache=2, policy="all"))
def test_a_staircase_is_one(case: AttentionInputs) -> None:
    """Against the dense mask of the stored keys: from the bottom right, row by row."""
    call = case.tensors()
    mask = visible(call)
    checked = selected_attention.call_of(**call)
    found = flash.staircase(
        flash.times(checked.query_position, checked.key_position, checked.evict_at, None)
    )
    stairs = True
    for b in range(mask.shape[0]):
        for h in range(mask.shape[3]):
            seen = mask[b, :, :, h]
            seen = seen[:, seen.any(0)]
            rows, columns = seen.shape
            below = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
            stairs = stairs and columns >= rows - 1 and torch.equal(seen, below)
    assert not found or stairs


def test_reasons() -> None:
    call = AttentionInputs(bias="some").tensors()
    assert explain(selected_attention, **call)["flash"] == "FlashAttention takes no bias"
    answer = explain(selected_attention, **AttentionInputs().tensors())["flash"]
    assert answer == "yes, when named: it waits for the device to tell which keys are stored"


class Elsewhere(NamedTuple):
    """What is asked of a tensor on a GPU."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


def test_reasons_of_the_device() -> None:
    def reason(
        device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64
    ) -> str | None:
        answer: str | None = WITHOUT(Elsewhere(torch.device(device), dtype, (1, 1, 1, dim)))
        return answer

    assert reason() is None
    assert reason("cpu") == "it has no kernel for tensors on cpu"
    assert reason(dtype=torch.float32) == "its kernels take bfloat16 and float16, not float32"
    assert reason(dim=260) == reason(dim=12).replace("12", "260")
    with patch.object(flash, "installed", lambda _: False):
        assert "neither flash_attn" in reason()


@pytest.mark.parametrize("old", [False, True])
def test_torchs_function_is_called_by_its_signature(old: bool) -> None:
    """torch 2.11 has neither grouped heads nor a scale."""
    told: dict[str, Any] = {}

    def new(
        query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa
    ):  # type: ignore[no-untyped-def]
        told.update(q=query, k=key, scale=scale, window=window_size, gqa=enable_gqa)
        return query, query[..., 0].mT

    def first(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
        told.update(q=query, k=key, causal=is_causal)
        return query, query[..., 0].mT

    q, k, borders = torch.randn(6, 2, 16), torch.randn(9, 1, 16), torch.zeros(2, dtype=torch.int32)
    with (
        patch.object(flash, "installed", lambda _: False),
        patch("torch.nn.attention.varlen.varlen_attn", first if old else new),
    ):
        VARLEN(q, k, k, borders, borders, (6, 9), True, 0.5)
    if old:
        assert told["causal"] is True
        assert told["k"].shape == (9, 2, 16)
        assert torch.equal(told["q"], q * (0.5 * 4))
    else:
        assert told["window"] == (-1, 0)
        assert (told["scale"], told["gqa"]) == (0.5, True)
        assert told["q"] is q
