"""FlexAttention, forward, for it has no backward on a CPU; and its mask of blocks, with blocks of a
few tokens."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import AttentionInputs, OpImplementation, assert_close, attention_inputs
from hamblocks.testing.kinds.ops import visible
from hamblocks_ops import UnsupportedError, explain, selected_attention
from hamblocks_ops.dispatch import WHEN_NAMED

flex = import_module("hamblocks_ops.selected_attention.flex")
PART = OpImplementation(selected_attention, impl="flex")


def forward(case: AttentionInputs, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return PART.problem(case, tensors).run("it", backward=False)


@pytest.mark.slow
@settings(max_examples=25)
@given(case=attention_inputs(tokens=st.integers(0, 40)))
@example(case=AttentionInputs(tokens=65, group=3, bias="some", policy="window"))
@example(case=AttentionInputs(packed=(0, 3, 0, 0, 40, 1, 0), bias="shared", dtype=torch.bfloat16))
@example(case=AttentionInputs(tokens=33, cache=50, bias="hidden", seed=3))
def test_is_the_reference(case: AttentionInputs) -> None:
    problem = PART.problem(case)
    exact, own = problem.run("reference", dtype=torch.float64, backward=False), problem.noise()
    plain = problem.run("reference", backward=False)
    got = forward(case)
    for name, x in got.items():
        error = float((plain[name].double() - exact[name]).nan_to_num().norm())
        assert x.dtype == plain[name].dtype
        assert_close(x, exact[name], name, own=max(error, 2 * own[name]))


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_is_not_seen_does_not_leak(garbage: float) -> None:
    for case in (
        AttentionInputs(tokens=20, bias="hidden"),
        AttentionInputs(tokens=6, cache=20, policy="any"),
    ):
        tensors = case.tensors()
        unseen = ~visible(tensors).any(1)[..., None]
        filled = [
            tensors | {x: tensors[x].masked_fill(unseen, value) for x in ("k", "v")}
            for value in (garbage, 0.0)
        ]
        for name, x in forward(case, filled[1]).items():
            assert torch.equal(forward(case, filled[0])[name], x)


@given(case=attention_inputs(dtype=torch.float64, bias="none", tokens=st.integers(1, 40)))
@example(case=AttentionInputs(packed=(9, 0, 4, 12), policy="window"))
def test_blocks_leave_out_nothing_visible_and_unmask_nothing_hidden(case: AttentionInputs) -> None:
    call = case.tensors()
    if not call["q"].numel() or not call["k"].numel():
        return
    checked = selected_attention.call_of(**call)
    time = flex.times(
        checked.query_position, checked.key_position, checked.evict_at, checked.cu_seqlens
    )
    mask = visible(call).permute(0, 3, 1, 2)
    with patch.object(flex, "BLOCK", 4):
        some, whole = flex.visited(time)
    for n, m in ((n, m) for n in range(some.shape[2]) for m in range(some.shape[3])):
        tile = mask[:, :, 4 * n : 4 * n + 4, 4 * m : 4 * m + 4].flatten(2)
        assert bool((some[:, :, n, m] | ~tile.any(2)).all())
        assert bool((~whole[:, :, n, m] | tile.all(2)).all())
    assert torch.equal(flex._seen_at_all(time), mask.any(2).transpose(1, 2))
    assert torch.equal(flex._sees_at_all(time, 1), mask.any(3).transpose(1, 2))


@pytest.mark.slow
def test_traces_whole() -> None:
    call = AttentionInputs(tokens=20, group=2, bias="some", dtype=torch.float32).tensors()

    def run() -> Tensor:
        with torch.no_grad():
            return selected_attention(**call, impl="flex").out

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(traced, run())


def test_reasons() -> None:
    call = AttentionInputs(dtype=torch.float32).tensors()
    assert (
        explain(selected_attention, **call)["flex"]
        == WHEN_NAMED + "it is the baseline: it visits keys that are not stored"
    )
    call["k"].requires_grad_()
    assert explain(selected_attention, **call)["flex"] == "FlexAttention has no backward on a CPU"
    with pytest.raises(UnsupportedError, match="no backward on a CPU"):
        selected_attention(**call, impl="flex")
    with torch.no_grad():
        assert bool(selected_attention(**call, impl="flex").out.isfinite().all())
    with patch.object(torch, "__version__", "2.8.1+cpu"):
        assert explain(selected_attention, **call)["flex"].endswith("this is 2.8.1+cpu")
