"""A layer on slices of a sequence equals the layer on the whole: outputs, decisions, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import hamblocks as hb
from hamblocks.parallel import ContextShard

HIDDEN = 16

LAYERS: dict[str, Any] = {
    "threshold": lambda: _layer(hb.Threshold(hb.FixedThreshold(0.8))),
    "window": lambda: _layer(hb.Window(3), gate=None),
    "topk": lambda: _layer(hb.TopK(4)),
    "topk_after_a_window": lambda: _layer(hb.TopK(3, delay=4), num_kv_heads=1),
    "union": lambda: _layer(hb.TopK(3) | hb.Window(5) | hb.Threshold(hb.FixedThreshold(1.1))),
    "intersection": lambda: _layer(hb.TopK(9) & hb.Threshold(hb.FixedThreshold(0.7))),
    "everything": lambda: _layer(None, gate=None),
    "nothing": lambda: _layer(hb.Threshold(hb.FixedThreshold(torch.inf))),
    "grouped": lambda: _layer(hb.Threshold(hb.FixedThreshold(0.8)), num_kv_heads=2),
    "shared": lambda: _layer(
        hb.Threshold(hb.FixedThreshold(0.9)), gate=hb.SharedGate(hb.PredictionError("l2"))
    ),
    "router": lambda: _layer(hb.TopK(5), gate=hb.LearnedRouter()),
    "conv": lambda: _layer(
        hb.Threshold(hb.FixedThreshold(0.8)),
        attention=hb.SelectedAttention(conv_size=3, conv_values=True),
    ),
    "own": lambda: _layer(
        hb.TopK(4),
        memory=hb.GatedDeltaMemory(
            (2, 4, 1), projections="own", num_heads=2, head_dim=6, expand_v=1.5
        ),
        gate=hb.SharedGate(hb.PredictionError("l2")),
    ),
    "memory_alone": lambda: _layer(memory=hb.DeltaMemory(), attention=None),
    "attention_alone": lambda: _layer(hb.FirstTokens(2) | hb.Window(4), memory=None),
    "stored_keys": lambda: _layer(
        hb.TopK(5), gate=hb.KeyNorm(), attention=hb.SelectedAttention(conv_size=3)
    ),
    "query_gate": lambda: _layer(
        hb.Threshold(hb.FixedThreshold(0.8)),
        query_gate=hb.ThresholdQueries(hb.PredictionError("l2"), hb.FixedThreshold(0.7)),
    ),
}


def _layer(selector: Any = "none", **parts: Any) -> hb.HAMLayer:
    if selector != "none":
        parts["selector"] = selector
    return hb.HAMLayer(HIDDEN, 4, head_dim=4, **parts)


def check(
    group: Any, name: str, lengths: list[int], packed: bool, order: str, dtype: torch.dtype
) -> None:
    """Compares outputs, decisions and all gradients of the shards with those of the whole."""
    torch.manual_seed(sum(lengths))
    layer = LAYERS[name]().to(dtype)
    tokens = sum(lengths) if packed else lengths[0]
    rows = 1 if packed else len(lengths)
    whole = torch.randn(rows, tokens, HIDDEN, dtype=dtype, requires_grad=True)
    ahead = torch.randn(rows, tokens, HIDDEN, dtype=dtype)
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    expected = layer(whole, cu_seqlens=cu_seqlens)
    wanted = _gradients(layer, whole, (expected.y * ahead).sum())

    shard = ContextShard(tokens, cu_seqlens=cu_seqlens, group=group, order=order)
    x = shard.take(whole.detach()).requires_grad_()
    result = layer(x, shard=shard)
    own = _gradients(layer, x, (result.y * shard.take(ahead)).sum())
    near = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(result.y, shard.take(expected.y), **near)
    if expected.stats.evict_at is not None:
        ends = _end_of_sequences(lengths, packed)
        live = [s.evict_at.clamp(max=10**6) for s in (result.stats, expected.stats)]
        # a lifetime beyond the end of the sequence says nothing
        local = shard.take(ends[None, :, None].expand(rows, -1, 1))
        torch.testing.assert_close(live[0].minimum(local), shard.take(live[1]).minimum(local))
    torch.testing.assert_close(own.pop("x"), shard.take(wanted.pop("x")), **near)
    for key, gradient in own.items():
        dist.all_reduce(gradient, group=group)
        torch.testing.assert_close(gradient, wanted[key], **near, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(shard.gather(result.y.detach()), expected.y.detach(), **near)


def _gradients(layer: Any, x: Any, loss: Any) -> dict[str, Any]:
    layer.zero_grad()
    x.grad = None
    loss.backward()
    # a rank without tokens has none, and a part that nobody uses has none
    parameters = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in layer.named_parameters()
    }
    return {"x": x.grad.clone(), **parameters}


def _end_of_sequences(lengths: list[int], packed: bool) -> Any:
    if not packed:
        return torch.full((lengths[0],), lengths[0], dtype=torch.int32)
    return torch.cat([torch.full((n,), n, dtype=torch.int32) for n in lengths])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_shards_equal_the_whole(workers, name):
    workers.run(check, 4, name, [37, 37], False, "head-tail", torch.float64)
    workers.run(check, 4, name, [5, 1, 23, 2, 14], True, "contiguous", torch.float64)
    workers.run(check, 2, name, [3, 29, 1, 12], True, "head-tail", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[0], [1], [3, 3], [2, 1], [9]])
@pytest.mark.parametrize("name", ["union", "router", "conv", "own", "query_gate"])
def test_ranks_and_chunks_without_tokens(workers, name, lengths):
    packed = len(set(lengths)) > 1
    workers.run(check, 4, name, lengths, packed, "head-tail", torch.float64)


def draw(seed: int) -> tuple[Any, ...]:
    """A layer, lengths of sequences and an order, drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    packed = number(2) == 1
    lengths = [number(40) for _ in range(number(6))]
    name = list(LAYERS)[number(len(LAYERS)) - 1]
    ranks, order = (2, 4)[number(2) - 1], ("head-tail", "contiguous")[number(2) - 1]
    rows = lengths if packed else lengths[:1] * number(3)
    return ranks, name, rows, packed, order, torch.float64


@pytest.mark.parametrize("seed", range(12))
def test_drawn_lengths(workers, seed):
    ranks, *case = draw(seed)
    workers.run(check, ranks, *case)
