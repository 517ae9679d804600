"""The scaled sum by its formula: norms, gates, and the read that a layer starts with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hamblocks as hb

MEMORY = {
    "one size": {},
    "sizes of its own": {"projections": "own", "num_heads": 6, "head_dim": 2, "expand_v": 2},
}


def layer(combiner: hb.ScaledSum, **memory) -> hb.HAMLayer:
    torch.manual_seed(0)
    parts = {"memory": hb.GatedDeltaMemory(**memory), "selector": hb.TopK(2)}
    return hb.HAMLayer(16, 4, combiner=combiner, **parts).double()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_gate", [None, "silu", "sigmoid"])
@pytest.mark.parametrize("attention_gate", [None, "silu", "sigmoid"])
def test_the_scaled_sum_is_its_formula(memory, memory_gate, attention_gate):
    part = hb.ScaledSum(
        bias=True, norm_eps=0.1, memory_gate=memory_gate, attention_gate=attention_gate
    )
    layer(part, **MEMORY[memory])
    for weight in part.parameters():
        nn.init.normal_(weight)
    heads, size = part.dims.memory_read
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    kept = torch.randn(2, 5, heads, size, dtype=torch.float64)
    read = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    activations = {"silu": F.silu, "sigmoid": torch.sigmoid}
    m = kept / (kept.square().mean(-1, keepdim=True) + 0.1).sqrt() * part.memory_norm.weight
    a = read
    if memory_gate is not None:
        m = m * activations[memory_gate](part.memory_g_proj(x)).view(m.shape)
    if attention_gate is not None:
        a = a * activations[attention_gate](part.attention_g_proj(x)).view(a.shape)
    scales = part.gate_proj(x)
    if memory == "one size":
        each = scales.unflatten(-1, (4, 2))
        joined = (each[..., :1] * m + each[..., 1:] * a).flatten(2)
    else:
        parts = scales[..., :heads, None] * m, scales[..., heads:, None] * a
        joined = torch.cat([one.flatten(2) for one in parts], -1)
    torch.testing.assert_close(part(x, kept, read), part.o_proj(joined), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("start", ["attention", "memory"])
def test_a_layer_starts_with_one_read(memory, start):
    part = hb.ScaledSum(start=start)
    layer(part, **MEMORY[memory])
    heads, size = part.dims.memory_read
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    kept, read = (torch.randn(2, 5, h, d).double() for h, d in ((heads, size), (4, 4)))
    other_kept, other_read = torch.randn_like(kept), torch.randn_like(read)
    y = part(x, kept, read)
    assert torch.equal(part(x, other_kept, read), y) == (start == "attention")
    assert torch.equal(part(x, kept, other_read), y) == (start == "memory")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"start": "both"}, "start"),
        ({"memory_gate": "relu"}, "memory_gate"),
        ({"attention_gate": True}, "attention_gate"),
    ],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected .*, got "):
        hb.ScaledSum(**arguments)
