"""Streaming top-k lifetimes: the cost grows like T log T and does not depend on k, on a CPU."""

from __future__ import annotations

import torch

from hamblocks.ops import select_topk

HEADS = 8


def test_topk_is_not_quadratic(ratio):
    short, long = torch.rand(1, 8192, HEADS), torch.rand(1, 65536, HEADS)
    name = "eight times the tokens, of the time of one"
    cost = ratio(name, lambda: select_topk(long, 1024), lambda: select_topk(short, 1024), rounds=5)
    assert cost < 24  # 64 would be quadratic in T, 8 log(8 T) / log(T) is 9.8


def test_topk_does_not_depend_on_k(ratio):
    score = torch.rand(1, 16384, HEADS)
    cost = ratio(
        "k = 8192, of k = 8",
        lambda: select_topk(score, 8192),
        lambda: select_topk(score, 8),
        rounds=7,
    )
    assert cost < 2
