"""Attention over a fraction of the tokens against causal attention over all, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hamblocks.ops import select_threshold, selected_attention

TOKENS, HEADS, HEAD_DIM = 8192, 4, 64
MAX_ERROR = 1e-6
"""Relative error allowed in float32 before an output is timed."""
EXTRA_FORWARD, EXTRA_TRAINING = 0.12, 0.2
"""Time allowed beyond the keep fraction, relative to attention over everything. The mask at the
edge of a block costs twice as much in training."""


def tensors():
    return [torch.randn(1, TOKENS, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]


def everything(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_forward_costs_what_is_kept(ratio, fraction):
    q, k, v = tensors()
    evict_at = select_threshold(torch.rand(1, TOKENS, HEADS), 1 - fraction)
    with torch.no_grad():
        for head in range(HEADS):  # all heads at once would take gigabytes in the reference
            one = [x[:, :, head : head + 1] for x in (q, k, v, evict_at)]
            fast, exact = (
                selected_attention(*one, impl=impl).out for impl in ("gather", "reference")
            )
            assert (fast - exact).norm() <= MAX_ERROR * exact.norm()
        cost = ratio(
            f"forward: keep fraction {fraction} / causal attention over everything",
            lambda: selected_attention(q, k, v, evict_at, impl="gather"),
            lambda: everything(q, k, v),
        )
    assert cost <= fraction + EXTRA_FORWARD


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_training_costs_what_is_kept(ratio, fraction):
    q, k, v = tensors()
    evict_at = select_threshold(torch.rand(1, TOKENS, HEADS), 1 - fraction)
    cotangent = torch.randn_like(q)

    def train(attend):
        return torch.autograd.grad(attend(q, k, v), (q, k, v), cotangent)

    def selected():
        return train(lambda *qkv: selected_attention(*qkv, evict_at, impl="gather").out)

    name = f"forward and backward: keep fraction {fraction} / causal attention over everything"
    cost = ratio(name, selected, lambda: train(everything), rounds=9)
    assert cost <= fraction + EXTRA_TRAINING
