"""Layers without a memory, and without attention: what is left is the other half, in one pass and in pieces."""

import math

import pytest
import torch
from hypothesis import example, given
from parts_cases import SIZES, Size, close, inputs
from torch.nn import functional as F

import hamblocks as hb
from hamblocks.attention import rotate


def without_memory(gate=None):
    return {
        "memory": hb.NoMemory(),
        "gate": hb.PeriodicGate(1) if gate is None else gate,
        "selector": hb.Threshold(-math.inf),
    }


def without_attention():
    return {"attention": hb.NoAttention(), "selector": hb.Threshold(math.inf)}


PARTS = {"memory": without_memory, "attention": without_attention}


def layer_of(size, parts, dtype=torch.float64):
    torch.manual_seed(size.seed)
    heads, kv_heads = size.heads
    layer = hb.HAMLayer(4 * heads, heads, num_kv_heads=kv_heads, **parts)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return layer.to(dtype).eval()


@given(size=SIZES)
@example(size=Size(0, 2, 0, (2, 1)))
@torch.no_grad()
def test_without_memory_attention_sees_everything(size):
    layer, x = layer_of(size, without_memory()), inputs(size)
    q, k, v = (
        proj(x).unflatten(-1, (-1, 4)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = layer.attention.q_norm(q), layer.attention.k_norm(k)
    q, k = (rotate(part, torch.arange(size.tokens)[None], 10_000.0) for part in (q, k))
    group = size.heads[0] // size.heads[1]
    k, v = (part.repeat_interleave(group, 2) for part in (k, v))
    read = F.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    close(layer(x).y, layer.combiner(x, torch.zeros_like(read), read))
    assert layer(x).stats.keep_fraction() == bool(x.numel())


@given(size=SIZES)
@torch.no_grad()
def test_without_attention_the_memory_is_left(size):
    layer, x = layer_of(size, without_attention()), inputs(size)
    full = layer_of(size, {"selector": hb.Threshold(math.inf)})
    full.load_state_dict(layer.state_dict(), strict=False)
    close(layer(x).y, full(x).y)
    assert layer(x).stats.keep_fraction() == 0


@pytest.mark.parametrize("name", PARTS)
def test_bfloat16_and_gradients(name):
    size = Size(0, 2, 9, (4, 2))
    layer, x = layer_of(size, PARTS[name](), torch.bfloat16), inputs(size, torch.bfloat16)
    y = layer(x).y
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in layer.parameters())
    assert layer.v_proj.weight.grad.any()


def test_what_the_trace_of_no_memory_says():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    position = torch.arange(5, dtype=torch.int32).expand(2, 5)
    read, trace, state = hb.NoMemory()(torch.randn(2, 5, 32), q, k, k, position=position)
    assert state == ()
    assert read.shape == trace.residual.shape == trace.k.shape == trace.v.shape == q.shape
    assert trace.score is None
    trace = hb.NoMemory()(torch.randn(2, 5, 32), q, k, k, position=position, metric="cosine")[1]
    assert trace.residual is None
    assert trace.score.shape == trace.beta.shape == (2, 5, 4)
    assert trace.score.dtype == torch.float32
    assert (repr(hb.NoMemory()), repr(hb.NoAttention())) == ("NoMemory()", "NoAttention()")
