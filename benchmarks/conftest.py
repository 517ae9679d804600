"""Ratios of times, measured side by side: a machine's mood then changes both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture
def ratio(benchmark: BenchmarkFixture) -> Callable[..., float]:
    """`ratio(name, candidate, baseline)`: fastest call against fastest call, of interleaved rounds of one call each.

    Whatever else runs on the machine only ever adds time, and adds it to a call of many small steps first; the
    median of the ratios, printed beside, tells how much of that there was.
    """

    def measure(
        name: str, candidate: Callable[[], object], baseline: Callable[[], object], rounds: int = 21
    ) -> float:
        slow = []

        def time_baseline() -> None:
            began = time.perf_counter()
            baseline()
            slow.append(time.perf_counter() - began)

        benchmark.pedantic(candidate, setup=time_baseline, rounds=rounds, warmup_rounds=1)
        pairs = list(zip(benchmark.stats.stats.data, slow[-rounds:], strict=True))
        best = min(x for x, _ in pairs) / min(x for _, x in pairs)
        median = statistics.median(x / y for x, y in pairs)
        benchmark.extra_info.update(ratio=best, median=median)
        print(f"{name}: {best:.3f}, median of the ratios {median:.3f}")
        return best

    return measure


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
