"""Ratios of times, measured side by side: a machine's mood then changes both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def ratio() -> Callable[..., float]:
    """`ratio(candidate, baseline)`: median over interleaved pairs of one call each."""

    def measure(candidate: Callable[[], object], baseline: Callable[[], object], rounds: int = 15) -> float:
        def seconds(call: Callable[[], object]) -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        for call in (candidate, baseline):
            call()
        return statistics.median(seconds(candidate) / seconds(baseline) for _ in range(rounds))

    return measure


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
