"""Streaming top-k lifetimes on a CPU: the time grows like T log T and does not depend on k."""

from __future__ import annotations

import torch

from hamblocks.ops import select_topk

HEADS = 8
MAX_GROWTH = 24
"""Ratio of times at eight times the tokens: T log T gives 9.8, quadratic growth 64."""
MAX_K = 2
"""Ratio of times at k = 8192 and k = 8."""


def test_topk_is_not_quadratic(ratio):
    short, long = torch.rand(1, 8192, HEADS), torch.rand(1, 65536, HEADS)
    name = "65536 tokens / 8192 tokens"
    cost = ratio(name, lambda: select_topk(long, 1024), lambda: select_topk(short, 1024), rounds=5)
    assert cost < MAX_GROWTH


def test_topk_does_not_depend_on_k(ratio):
    score = torch.rand(1, 16384, HEADS)
    cost = ratio(
        "k = 8192 / k = 8",
        lambda: select_topk(score, 8192),
        lambda: select_topk(score, 8),
        rounds=7,
    )
    assert cost < MAX_K
