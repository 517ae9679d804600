"""What the Triton attention visits, and its kernels with tiles so small that cases have many."""

from __future__ import annotations

import mmap
from collections.abc import Callable
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
from hamblocks_ops.packing import sequence_of
from hamblocks_ops.selected_attention.call import AttentionCall, AttentionOutput

plans, sizes, stored_keys = (
    import_module(f"hamblocks_ops.selected_attention.triton.{name}")
    for name in ("plan", "sizes", "stored")
)
IMPLEMENTATION = OpImplementation(selected_attention, impl="triton")
LOW = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def small_tiles() -> Any:
    tiles = (16, 8, 4, 1), (8, 16, 4, 1), (16, 8, 4, 1)
    configs = tuple(sizes.Config(*one) for one in tiles)
    return patch.object(sizes, "configs", lambda *_args, **_more: configs)


@pytest.mark.slow
@settings(max_examples=6)
@given(case=attention_inputs(dtype=LOW))
@example(case=AttentionInputs(tokens=40, policy="topk", bias="some", group=2, dtype=torch.bfloat16))
@example(case=AttentionInputs(tokens=40, policy="window", dtype=torch.float16))
@example(case=AttentionInputs(tokens=33, cache=50, bias="hidden", seed=3, dtype=torch.float32))
@example(case=AttentionInputs(packed=(17, 0, 3, 21), bias="shared", dtype=torch.bfloat16))
def test_small_tiles_are_the_reference(case: AttentionInputs) -> None:
    with small_tiles():
        assert_close_to_reference(IMPLEMENTATION.problem(case), "it")


class Stored:
    """What the kernels list, copy and plan for a call, and the same by definition.

    Attributes:
        stored: the result of the kernels.
        mask: bool [R, Tq, Tk], which query sees which key.
    """

    def __init__(self, call: AttentionCall, tiles: tuple[tuple[int, int], ...], keep: bool) -> None:
        self.configs = tuple(sizes.Config(*tile, 4, 1) for tile in tiles)
        self.sizes = stored_keys.Sizes.of(call.q, call.k, self.configs, keep=keep)
        self.stored = stored_keys.store_keys(call, self.configs, keep=keep)
        asked = call.query_position[:, :, None, None]
        mask = (call.key_position[:, None] <= asked) & (asked < call.evict_at[:, None])
        if call.cu_seqlens is not None:
            own = sequence_of(call.cu_seqlens, call.k.shape[1])
            mask &= (own[:, None] == own)[None, :, :, None]
        self.mask = mask.permute(0, 3, 1, 2).flatten(0, 1)

    def by_slot(self) -> Tensor:
        """The mask by slots of the lists, bool [R, Tq, slots]; what is not listed is not seen."""
        index = self.stored.times[0].long()[:, None].expand(-1, self.mask.shape[1], -1)
        return self.mask.gather(2, index.clamp(min=0)) & (index >= 0)

    def by_queries(self, which: int) -> tuple[Tensor, Tensor]:
        """Which blocks a plan of blocks of queries visits how often [R, NQ, NB], and which whole."""
        tile = self.configs[which]
        blocks = -(-self.mask.shape[1] // tile.queries)
        plan = self.sizes.split(self.stored.plans)[which].view(-1, blocks, plans.FIELDS.value)
        number = torch.arange(self.sizes.slots // tile.keys)

        def within(begin: Tensor, end: Tensor) -> Tensor:
            return (begin[..., None] <= number) & (number < end[..., None])

        whole = within(plan[..., 0], plan[..., 1])
        visited = whole.int()
        for part in range(int(plan[..., 2].max())):
            there = (part < plan[..., 2])[..., None]
            begin, end = plan[..., 4 + 2 * part], plan[..., 5 + 2 * part]
            visited += (there & within(begin, end)).int()
        return visited, whole

    def by_keys(self) -> tuple[Tensor, Tensor]:
        """The same of the plan of blocks of keys."""
        tile = self.configs[2]
        plan = self.sizes.split(self.stored.plans)[2].view(
            -1, self.sizes.slots // tile.keys, plans.KEY_FIELDS.value
        )
        number = torch.arange(-(-self.mask.shape[1] // tile.queries))[:, None]
        begin, full_begin, full_end, end = (x[:, None] for x in plan.unbind(2))
        visited = (begin <= number) & (number < end)
        return visited.int(), (full_begin <= number) & (number < full_end)

    def tiles(self, which: int) -> Tensor:
        """The mask in the tiles of a kernel, [R, NQ, M, NB, N]; the last may have fewer queries."""
        tile, seen = self.configs[which], self.by_slot()
        short = -seen.shape[1] % tile.queries
        seen = torch.cat([seen, seen[:, -1:].expand(-1, short, -1)], 1)
        return seen.unflatten(2, (-1, tile.keys)).unflatten(1, (-1, tile.queries))


@pytest.mark.slow
@settings(max_examples=15)
@given(
    case=attention_inputs(
        dtype=st.just(torch.float32), tokens=st.integers(1, 40), dim=st.integers(1, 3)
    ),
    tiles=st.sampled_from([((4, 4), (8, 2), (4, 8)), ((8, 2), (4, 2), (4, 2))]),
)
@example(
    case=AttentionInputs(packed=(9, 0, 4, 12), policy="window", dtype=torch.float32),
    tiles=((4, 4), (8, 2), (4, 8)),
)
@example(
    case=AttentionInputs(tokens=300, batch=1, policy="topk", seed=1, dtype=torch.float32),
    tiles=((32, 8), (16, 4), (16, 16)),
)
def test_nothing_visible_is_left_out_and_nothing_hidden_goes_unmasked(
    case: AttentionInputs, tiles: tuple[tuple[int, int], ...]
) -> None:
    given_call = case.tensors()
    call = selected_attention.call_of(**given_call)
    if not call.q.numel() or not call.k.numel():
        return
    with patch.multiple(stored_keys, TOKENS=64, MOMENTS=16, COUNTS=2):
        made = Stored(call, tiles, keep=True)
    index, position, evict_at = made.stored.times
    # every token has a slot, each part in the order of the tokens
    for row in index:
        assert torch.equal(row[row >= 0].sort().values, torch.arange(call.k.shape[1]).int())
    # by the clock of the lists, queries see what they see
    asked = made.stored.asked.repeat_interleave(call.k.shape[2], 0)[..., None]
    assert torch.equal((position[:, None] <= asked) & (asked < evict_at[:, None]), made.by_slot())
    # what some query sees is copied
    there, kept = index.clamp(min=0).long(), position != NEVER
    copies = zip((call.k, call.v), made.stored[:2], strict=True)
    for x, copy in copies:
        by_stream = x.transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_stream.gather(1, there[..., None].expand_as(copy))[kept], copy[kept])
    if call.logit_bias is not None:
        bias = call.logit_bias.transpose(1, 2).flatten(0, 1).float().gather(1, there)
        assert torch.allclose(bias[kept] * 1.4426950408889634, made.stored.bias[kept])
    # every pair of a query and a key that it sees is visited once, and masked where it has to be
    for which, (visited, whole) in enumerate(
        (made.by_queries(0), made.by_queries(1), made.by_keys())
    ):
        seen = made.tiles(which)
        assert int(visited.max()) <= 1
        assert bool((visited.bool() | ~seen.any(4).any(2)).all())
        assert bool((seen.all(4).all(2) | ~whole).all())


TOKENS, TILE = 1024, 8


def visits(evict_at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which blocks the forward kernel visits and which whole [NQ, NB]; the tokens seen by blocks."""
    x = torch.zeros(1, TOKENS, 1, 1)
    call = selected_attention.call_of(x, x, x, evict_at)
    made = Stored(call, ((TILE, TILE),) * 3, keep=False)
    visited, whole = made.by_queries(0)
    return visited[0], whole[0], made.tiles(0).any(2).sum((2, 3))[0]


@pytest.mark.slow
def test_cost_follows_what_is_kept() -> None:
    score = torch.rand(1, TOKENS, 1, generator=torch.Generator().manual_seed(0))
    everything = int(visits(select_threshold(score, 0.0))[0].sum())
    for fraction in (0.5, 0.1):
        visited, whole, _ = visits(select_threshold(score, 1 - fraction))
        assert int(visited.sum()) <= (fraction + 0.03) * everything
        assert int((visited.bool() & ~whole).sum()) <= 3 * visited.shape[0]


@pytest.mark.slow
def test_a_window_costs_its_width_beside_what_lasts() -> None:
    score = torch.rand(1, TOKENS, 1, generator=torch.Generator().manual_seed(0))
    position = torch.arange(TOKENS, dtype=torch.int32)[None, :, None]
    lasting = select_threshold(score, 0.9)
    alone, both = (visits(x)[0].sum() for x in (lasting, torch.maximum(lasting, position + 32)))
    assert int(both - alone) <= (32 // TILE + 3) * TOKENS // TILE


@pytest.mark.slow
def test_a_few_long_lives_do_not_lengthen_the_walk_through_short_ones() -> None:
    """In one list by position nearly every block would hold a long-lived token."""
    position = torch.arange(TOKENS, dtype=torch.int32)[None, :, None]
    visited, _, seen = visits(position + torch.where(position % TILE == 0, TOKENS // 4, TILE))
    assert int(visited.sum()) <= 2 * int(((seen + TILE - 1) // TILE).sum())


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
    # not `test_aot_dispatch_dynamic`: what is kept for the backward pass has slots that nothing writes
    # or reads, and it compares them; the next test compares what is traced
    sound = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton.attend, (*learning, checked.scale, True), test_utils=sound)
    out, *kept = triton.attend(*args, checked.scale, True)
    checks = ("test_schema", "test_faketensor")  # the backward of the backward is not promised
    backward = (torch.ones_like(out), *args[:2], checked.logit_bias, *kept, checked.scale)
    torch.library.opcheck(triton.attend_backward, backward, test_utils=checks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_queries_lie_further_apart_than_32_bits_reach() -> None:
    stride, block = 2**24 + 1, 256
    # memory that is not touched takes none
    x = torch.frombuffer(mmap.mmap(-1, block * stride), dtype=torch.int8)
    x[stride * (block - 1)] = 7
    found = torch.empty(block, dtype=torch.int32)
    import_module("interpreted_kernels").rows[(1,)](x, found, stride, block)
    assert found[-1] == 7
    assert not found[:-1].any()


@pytest.mark.slow
def test_traces_whole_with_its_backward_pass() -> None:
    case = AttentionInputs(tokens=9, bias="some", dtype=torch.float32)
    call = case.tensors()
    names = [name for name, x in call.items() if x.is_floating_point()]

    learning = {name: x.requires_grad_() if name in names else x for name, x in call.items()}

    def attend(**call: Tensor) -> AttentionOutput:
        return selected_attention(**call, impl="triton")

    def step(run: Callable[..., AttentionOutput]) -> list[Tensor]:
        result = run(**learning)
        wanted = [learning[name] for name in names]
        return [*result, *torch.autograd.grad(result.out.sum(), wanted)]

    whole = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for got, expected in zip(step(whole), step(attend), strict=True):
        assert torch.equal(got, expected)
