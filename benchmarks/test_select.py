"""Streaming top-k lifetimes: the cost grows like T log T and does not depend on k, on a CPU."""

from __future__ import annotations

import torch

from hamblocks.ops import select_topk

HEADS = 8


def test_topk_is_not_quadratic(benchmark, ratio):
    short, long = torch.rand(1, 8192, HEADS), torch.rand(1, 65536, HEADS)
    cost = ratio(lambda: select_topk(long, 1024), lambda: select_topk(short, 1024), rounds=5)
    benchmark.extra_info.update(ratio=cost)
    benchmark.pedantic(lambda: select_topk(long, 1024), rounds=3, warmup_rounds=1)
    print(f"eight times the tokens: {cost:.1f} times the time")
    assert cost < 24  # 64 would be quadratic in T, 8 log(8 T) / log(T) is 9.8


def test_topk_does_not_depend_on_k(benchmark, ratio):
    score = torch.rand(1, 16384, HEADS)
    cost = ratio(lambda: select_topk(score, 8192), lambda: select_topk(score, 8), rounds=7)
    benchmark.extra_info.update(ratio=cost)
    benchmark.pedantic(lambda: select_topk(score, 8192), rounds=3, warmup_rounds=1)
    print(f"k = 8192: {cost:.2f} of the time of k = 8")
    assert cost < 2
