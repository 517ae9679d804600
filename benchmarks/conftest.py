"""Ratios of times that are measured side by side, so that load on the machine affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture
def ratio(benchmark: BenchmarkFixture) -> Callable[..., float]:
    """`ratio(name, candidate, baseline)` times both in turns and compares the fastest calls.

    Other load on the machine only adds time, and calls of many small steps suffer first. The median
    of the ratios over all rounds is printed beside the result and shows how much load there was.
    """

    def measure(
        name: str, candidate: Callable[[], object], baseline: Callable[[], object], rounds: int = 21
    ) -> float:
        baseline_times = []

        def time_baseline() -> None:
            began = time.perf_counter()
            baseline()
            baseline_times.append(time.perf_counter() - began)

        benchmark.pedantic(candidate, setup=time_baseline, rounds=rounds, warmup_rounds=1)
        # the setup of the warm-up round timed the baseline too
        pairs = list(zip(benchmark.stats.stats.data, baseline_times[-rounds:], strict=True))
        best = min(x for x, _ in pairs) / min(x for _, x in pairs)
        median = statistics.median(x / y for x, y in pairs)
        benchmark.extra_info.update(ratio=best, median=median)
        print(f"{name}: {best:.3f}, median of the ratios {median:.3f}")
        return best

    return measure


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
