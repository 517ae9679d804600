"""A training step reads no value on the host, with the implementations that run on a GPU.

Tensors have no values: they are fake ones of torch, so whatever depends on a value is an error.
They are called tensors of a CPU, because torch without CUDA differentiates no others. What copies
between devices is therefore found by its op.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import Launches, chosen_as_on_a_gpu, noted
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM

READS = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where a value of a fake tensor, or a size that depends on one, is asked for."""
FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy", "lift"}
"""Ops by which torch makes a tensor of numbers of Python: on a GPU, a copy that waits."""


class WaitsForDeviceError(AssertionError):
    """An op that waits for the device, or copies from or to it."""


class NoWaiting(Launches):
    """Refuses ops that copy between devices; fake tensors refuse to be read themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        to = (kwargs or {}).get("device")
        if name in FROM_THE_HOST or (name == "_to_copy" and to not in (None, args[0].device)):
            raise WaitsForDeviceError(f"{func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class NoCopies(TorchFunctionMode):
    """Refuses copies to a CPU, which do nothing where tensors are on one already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # a device by its name: `x.to(y.device)` copies nothing
        to = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)]
        if func in (Tensor.cpu, Tensor.numpy) or (func is Tensor.to and to):
            raise WaitsForDeviceError(f"{func}")
        return func(*args, **kwargs)


SELECTORS = {
    "target": lambda: hb.Threshold(hb.TargetFraction(0.25)) | hb.Window(32),
    "annealed": lambda: hb.Threshold(hb.AnnealedFraction(0.25, 10)) | hb.FirstTokens(4),
    "elastic": lambda: hb.Threshold(hb.ElasticFraction()),
    "topk": lambda: hb.TopK(16, delay=8),
}


def training_step(selector: Any, packed: bool) -> list[str]:
    """One step of a model of three layers in bfloat16; returns what it launched."""
    config = HAMConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        selector=selector,
    )
    dtype = torch.get_default_dtype()
    with chosen_as_on_a_gpu(), FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = HAMForCausalLM(config).train()
        finally:
            torch.set_default_dtype(dtype)
        # "fused" is what keeps the number of steps on the device
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        hb.hook_controllers(optimizer, model)
        ids = torch.zeros(1 if packed else 2, 200, dtype=torch.int64)
        more: dict[str, Tensor] = {}
        if packed:
            more["cu_seq_lens_q"] = torch.zeros(5, dtype=torch.int32)
            more["position_ids"] = torch.zeros(1, 200, dtype=torch.int64)
        with NoCopies(), noted(NoWaiting()) as launches:
            loss = model(input_ids=ids, labels=ids, **more).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hb.step_controllers(model)
    return launches.names


@pytest.mark.parametrize(
    ("selector", "packed"),
    [("target", False), ("topk", False), *((selector, True) for selector in SELECTORS)],
)
def test_a_training_step_never_waits(selector: str, packed: bool) -> None:
    names = training_step(SELECTORS[selector](), packed)
    # the step ran the kernels of a GPU, forward and backward, in each of three layers
    for kernel in (
        "selected_attention forward_kernel",
        "selected_attention queries_grad_kernel",
        "selected_attention keys_grad_kernel",
        "gated_delta_rule residual_kernel",
        "fla chunk_fwd_kernel_o",
        "fla chunk_bwd_kernel_dqkwg",
    ):
        assert names.count(kernel) == 3, kernel


def test_layers_share_what_fla_is_given_of_the_borders() -> None:
    """Chunks are counted once a step for all layers, forward and backward."""
    fla = import_module("hamblocks_ops.gated_delta_rule.fla")
    with patch.object(fla, "_made_packed", wraps=fla._made_packed) as made:
        training_step(hb.Window(32), packed=True)
    assert made.call_count == 1


def test_borders_that_change_in_place_are_cut_anew() -> None:
    packed = import_module("hamblocks_ops.gated_delta_rule.fla")._packed
    borders = torch.tensor([0, 3, 130], dtype=torch.int32)
    first = packed(borders, 130)
    assert packed(borders, 130) is first
    borders[1] = 65
    assert packed(borders, 130).chunks[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6).filter(any))
def test_chunks_are_those_of_fla_and_empty_ones(lengths: list[int]) -> None:
    from fla.ops.utils.index import prepare_chunk_indices

    made = import_module("hamblocks_ops.gated_delta_rule.fla")._made_packed
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = made(borders, sum(lengths))
    right = prepare_chunk_indices(borders.long(), 64)
    assert torch.equal(packed.chunks[: len(right)], right)
    for sequence, number in packed.chunks[len(right) :].tolist():
        assert sequence == len(lengths) - 1
        assert number * 64 >= lengths[-1]


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.ones(3).repeat_interleave(x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.int32),
        lambda x: x.to(torch.device("meta")),
        lambda x: torch.tensor([1, 2, 3]) + x,
    ],
)
def test_what_waits_is_an_error(reads: Any) -> None:
    with FakeTensorMode():
        x = torch.ones(3, dtype=torch.int64)
        with NoCopies(), noted(NoWaiting()), pytest.raises((*READS, WaitsForDeviceError)):
            reads(x)
