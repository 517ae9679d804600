"""A layer whose memory and attention are fused kernels: traced whole, same as torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hamblocks as hb
from hamblocks.testing.comparing import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="tests/gpu has it where kernels are compiled"
    ),
]


def layer(memory: str, attention: str) -> hb.HAMLayer:
    torch.manual_seed(0)
    made = hb.HAMLayer(
        32,
        2,
        memory=hb.GatedDeltaMemory(impl=memory),
        attention=hb.SelectedAttention(impl=attention),
        selector=hb.Threshold(0.9) | hb.Window(4),
    )
    return made.to(torch.bfloat16).eval()


def run(made: hb.HAMLayer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, _, stats = made(x)
    return [
        y.detach(),
        stats.score,
        stats.evict_at,
        *torch.autograd.grad(y, [x, *made.parameters()], torch.ones_like(y)),
    ]


def test_compiles_whole() -> None:
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    eager = run(layer("fla", "triton"), x)
    with compiled(layer("fla", "triton")) as fast:
        traced = run(fast, x)
    for got, expected in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, expected)
