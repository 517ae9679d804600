"""Tensor parallel: outputs, decisions, gradients and thresholds are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy

import hamblocks as hb
from hamblocks.parallel import ContextShard
from hamblocks.parallelize import parallelize, split_heads

HIDDEN, HEADS, TOKENS, VOCAB = 16, 4, 21, 19


def layer(**parts: Any) -> hb.HAMLayer:
    torch.manual_seed(0)
    parts = {"selector": hb.Threshold(0.9) | hb.Window(3)} | parts
    made = hb.HAMLayer(HIDDEN, parts.pop("num_heads", HEADS), **parts).double()
    with torch.no_grad():  # biases and null logits start at 0
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return made


LAYERS: dict[str, Any] = {
    "default": lambda: layer(selector=hb.Threshold(hb.TargetFraction(0.3)) | hb.Window(3)),
    "grouped heads": lambda: layer(num_heads=8, num_kv_heads=4, head_dim=4, qkv_bias=True),
    "shared gate": lambda: layer(gate=hb.SharedGate(hb.PredictionError())),
    "shared router": lambda: layer(gate=hb.SharedGate(hb.LearnedRouter()), selector=hb.TopK(5)),
    "router": lambda: layer(gate=hb.LearnedRouter(), selector=hb.Threshold(0.0)),
    "top-k": lambda: layer(gate=hb.PredictionError("l2"), selector=hb.TopK(4, delay=2)),
    "head thresholds": lambda: layer(selector=hb.HeadThresholds([0.8, 0.9, 1.0, 1.1])),
    "convolved keys and values": lambda: layer(
        attention=hb.SelectedAttention(conv_size=3, conv_values=True, null_sink=True),
        memory=hb.DeltaMemory(conv_size=[4, 3, 2]),
    ),
    "sizes of its own": lambda: layer(
        memory=hb.GatedDeltaMemory(projections="own", num_heads=8, head_dim=4, expand_v=2)
    ),
    "own projections, output gate": lambda: layer(
        memory=hb.GatedDeltaMemory(projections="own"), combiner=hb.GatedSum(output_gate=True)
    ),
    "weighted sum": lambda: layer(
        gate=hb.WeightedSum(
            [hb.RandomGate(heads="own"), hb.SharedGate(hb.LearnedRouter()), hb.KeyNorm()],
            [1.0, 1.0, 0.1],
        ),
        selector=hb.Threshold(0.5),
    ),
    "query gate": lambda: layer(
        query_gate=hb.ThresholdQueries(hb.LearnedRouter(), 0.0, window=2),
        combiner=hb.ScaledSum(bias=True),
    ),
    "unstored memory": lambda: layer(memory=hb.UnstoredMemory(hb.GatedDeltaMemory())),
    "only attention": lambda: layer(memory=None, selector=hb.Window(5)),
    "only a memory": lambda: layer(attention=None, selector=None),
}


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")


def close(found: Any, wanted: Any, name: str = "") -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


def same_gradients(model: Any, whole: Any, scale: float = 1) -> None:
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        close(weight.full_tensor(), other.detach(), name)
        if other.grad is None:
            assert weight.grad is None
        else:
            close(weight.grad.full_tensor() * scale, other.grad, name)


def own_heads(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The heads of this rank; of one score for all heads, that score."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return x if x.shape[2] == 1 else x.chunk(ranks, 2)[rank]


def is_as_one_process(group: Any, names: list[str]) -> None:
    for name in names:
        whole, split = LAYERS[name](), LAYERS[name]()
        split_heads(split, mesh_of(group))
        x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
        for cu_seqlens in (None, torch.tensor([0, 6, TOKENS], dtype=torch.int32)):
            inputs = [x[:1] if cu_seqlens is not None else x for _ in range(2)]
            one, other = (one.clone().requires_grad_() for one in inputs)
            wanted, found = whole(one, cu_seqlens=cu_seqlens), split(other, cu_seqlens=cu_seqlens)
            close(found.y, wanted.y, name)
            if wanted.stats.evict_at is not None:
                assert torch.equal(found.stats.evict_at, own_heads(wanted.stats.evict_at, group))
            for result in (wanted, found):
                result.y.square().sum().backward()
            close(other.grad, one.grad, name)
        same_gradients(split, whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_is_that_of_one_process(workers, ranks):
    workers.run(is_as_one_process, ranks, list(LAYERS))
