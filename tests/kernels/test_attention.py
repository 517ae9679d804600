"""What the Triton attention visits, and its kernels with tiles so small that cases have many."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import (
    AttentionInputs,
    OpImplementation,
    assert_close_to_reference,
    attention_inputs,
)
from hamblocks_ops import NEVER, explain, select_threshold, selected_attention
from hamblocks_ops.dispatch import WHEN_NAMED
from hamblocks_ops.selected_attention import lists

IMPLEMENTATION = OpImplementation(selected_attention, impl="triton")
LOW = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def small_tiles() -> Any:
    sizes = import_module("hamblocks_ops.selected_attention.triton.sizes")
    tiles = (16, 8, 4, 1), (8, 16, 4, 1), (16, 8, 4, 1)
    configs = tuple(sizes.Config(*one) for one in tiles)
    return patch.object(sizes, "configs", lambda *_args, **_more: configs)


@pytest.mark.slow
@settings(max_examples=10)
@given(case=attention_inputs(dtype=LOW))
@example(case=AttentionInputs(tokens=40, policy="topk", bias="some", group=2, dtype=torch.bfloat16))
@example(case=AttentionInputs(tokens=40, policy="window", dtype=torch.float16))
@example(case=AttentionInputs(tokens=33, cache=50, bias="hidden", seed=3, dtype=torch.float32))
@example(case=AttentionInputs(packed=(17, 0, 3, 21), bias="shared", dtype=torch.bfloat16))
def test_small_tiles_are_the_reference(case: AttentionInputs) -> None:
    with small_tiles():
        assert_close_to_reference(IMPLEMENTATION.problem(case), "it")


def extremes(index: Tensor, time: lists.Times, block: int) -> lists.Blocks:
    """By their definition, from the tokens in the slots."""
    position, evict_at = (x.transpose(1, 2).flatten(0, 1) for x in (time.position, time.evict_at))
    there = index.clamp(min=0).long()
    begins = position.gather(1, there).masked_fill(index < 0, NEVER).unflatten(1, (-1, block))
    least, most = (
        evict_at.gather(1, there).masked_fill(index < 0, fill).unflatten(1, (-1, block))
        for fill in (NEVER, -1)
    )
    return lists.Blocks(begins.amin(2), begins.amax(2), least.amin(2), most.amax(2))


class Visits:
    """Which pairs of blocks a call visits, by queries and by keys, bool [R, NQ, NB] each, and which
    need no mask."""

    def __init__(self, time: lists.Times, queries: int, keys: int) -> None:
        self.index, first = lists.list_keys(time, keys)
        blocks = extremes(self.index, time, keys)
        low, high = lists.query_blocks(time.asked, queries)
        plan = lists.plan_queries(blocks, first, low, high).long()
        begin, full_begin, full_end, end, other_begin, other_end = (
            x[..., None] for x in plan.unbind(2)
        )
        n = torch.arange(blocks.least_position.shape[1])
        group = first.shape[0] // low.shape[0]
        low, high = (x.repeat_interleave(group, 0)[..., None] for x in (low, high))
        self.walked = ((n >= begin) & (n < end)) | ((n >= other_begin) & (n < other_end))
        self.whole = (n >= full_begin) & (n < full_end)
        alive = (blocks.least_position[:, None] <= high) & (blocks.most_evict_at[:, None] > low)
        self.read = self.whole | (self.walked & alive)
        by_keys = lists.plan_keys(blocks, *lists.query_blocks(time.asked, queries)).long()
        begin, full_begin, full_end, end = (x[:, None] for x in by_keys.unbind(2))
        m = torch.arange(plan.shape[1])[:, None]
        self.read_by_keys, self.whole_by_keys = (
            (m >= begin) & (m < end),
            (m >= full_begin) & (m < full_end),
        )


@given(
    case=attention_inputs(dtype=torch.float64, bias="none", tokens=st.integers(1, 40)),
    queries=st.sampled_from([4, 8]),
    keys=st.sampled_from([2, 4]),
)
@example(case=AttentionInputs(packed=(9, 0, 4, 12), policy="window"), queries=4, keys=2)
def test_nothing_visible_is_left_out_and_nothing_hidden_goes_unmasked(
    case: AttentionInputs, queries: int, keys: int
) -> None:
    call = case.tensors()
    checked = selected_attention.call_of(**call)
    if not checked.q.numel() or not checked.k.numel():
        return
    time = lists.times(
        checked.query_position, checked.key_position, checked.evict_at, checked.cu_seqlens
    )
    visits = Visits(time, queries, keys)
    mask = (time.position[:, None] <= time.asked[:, :, None, None]) & (
        time.asked[:, :, None, None] < time.evict_at[:, None]
    )
    if checked.cu_seqlens is not None:  # one clock for all sequences hides them from each other
        own = torch.repeat_interleave(
            torch.arange(len(call["cu_seqlens"]) - 1), call["cu_seqlens"].diff().long()
        )
        apart = (own[:, None] != own)[None, :, :, None]
        assert not bool((mask & apart).any())
        plain = (checked.key_position[:, None] <= checked.query_position[:, :, None, None]) & (
            checked.query_position[:, :, None, None] < checked.evict_at[:, None]
        )
        assert torch.equal(mask, plain & ~apart)
    for row in range(visits.index.shape[0]):
        batch, head = divmod(row, time.position.shape[2])
        seen = torch.nn.functional.pad(mask[batch, :, :, head], [0, 1])[:, visits.index[row].long()]
        for m in range(visits.read.shape[1]):
            for n in range(visits.read.shape[2]):
                tile = seen[m * queries : (m + 1) * queries, n * keys : (n + 1) * keys]
                for read, whole in (
                    (visits.read, visits.whole),
                    (visits.read_by_keys, visits.whole_by_keys),
                ):
                    assert bool(read[row, m, n]) or not bool(tile.any())
                    assert bool(tile.all()) or not bool(whole[row, m, n])


TOKENS, TILE = 8192, 64


def visits(evict_at: Tensor) -> Visits:
    position = torch.arange(TOKENS, dtype=torch.int32)[None]
    return Visits(
        lists.times(position, position[..., None].expand_as(evict_at), evict_at, None), TILE, TILE
    )


def test_cost_follows_what_is_kept() -> None:
    score = torch.rand(1, TOKENS, 2, generator=torch.Generator().manual_seed(0))
    everything = int(visits(select_threshold(score, 0.0)).read.sum())
    for fraction in (0.5, 0.25, 0.1):
        found = visits(select_threshold(score, 1 - fraction))
        assert int(found.read.sum()) <= (fraction + 0.03) * everything
        assert (
            int((found.read & ~found.whole).sum()) <= 3 * found.read.shape[0] * found.read.shape[1]
        )


def test_a_window_costs_its_width_beside_what_lasts() -> None:
    score = torch.rand(1, TOKENS, 1, generator=torch.Generator().manual_seed(0))
    position = torch.arange(TOKENS, dtype=torch.int32)[None, :, None]
    lasting = select_threshold(score, 0.9)
    alone, both = (
        visits(x).walked.sum() for x in (lasting, torch.maximum(lasting, position + 256))
    )
    assert int(both - alone) <= (256 // TILE + 3) * TOKENS // TILE


def test_reasons() -> None:
    call = AttentionInputs().tensors()
    answers = [
        explain(
            selected_attention,
            **{name: x.to(dtype) if x.is_floating_point() else x for name, x in call.items()},
        )
        for dtype in (torch.float64, torch.bfloat16)
    ]
    assert answers[0]["triton"] == "it computes in float32 at the most"
    if not torch.cuda.is_available():
        assert answers[1]["triton"] == WHEN_NAMED + "Triton's interpreter is for tests"
        assert answers[1].chosen == "gather"
    wide = torch.zeros(1, 2, 1, 264, dtype=torch.bfloat16)
    evict_at = torch.zeros(1, 2, 1, dtype=torch.int32)
    assert "256" in explain(selected_attention, wide, wide, wide, evict_at)["triton"]


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    call = AttentionInputs(dtype=torch.float32).tensors()
    with patch("hamblocks_ops.dispatch.interpreting", lambda: False):
        answer = explain(selected_attention, **call)["triton"]
    assert (
        answer
        == "Triton compiles for a GPU, the tensors are on cpu (TRITON_INTERPRET=1 runs it on a CPU)"
    )
    with patch("hamblocks_ops.dispatch.installed", lambda _: False):
        answer = explain(selected_attention, **call)["triton"]
    assert answer == "Triton is not installed (pip install hamblocks[gpu])"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        AttentionInputs(tokens=5, bias="some"),
        AttentionInputs(packed=(2, 0, 3)),
        AttentionInputs(tokens=3, cache=7),
    ],
    ids=["bias", "packed", "cache"],
)
def test_operators_are_registered_well(case: AttentionInputs) -> None:
    triton = import_module("hamblocks_ops.selected_attention.triton")
    tensors = {
        name: x.float() if x.is_floating_point() else x for name, x in case.tensors().items()
    }
    checked = selected_attention.call_of(**tensors)
    args = [checked.q, checked.k, checked.v, checked.evict_at, checked.logit_bias]
    args += [checked.query_position, checked.key_position, checked.cu_seqlens]
    learning = [
        x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in args
    ]
    torch.library.opcheck(triton.attend, (*learning, checked.scale, True))
    out, lse, exact = triton.attend(*args, checked.scale, True)
    checks = ("test_schema", "test_faketensor")  # the backward of the backward is not promised
    backward = (torch.ones_like(out), *args, lse, exact, checked.scale)
    torch.library.opcheck(triton.attend_backward, backward, test_utils=checks)
