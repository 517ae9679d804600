"""Ratios of times, measured side by side: a machine's mood then changes both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def ratio() -> Callable[..., float]:
    """`ratio(candidate, baseline)`: fastest call against fastest call, of interleaved rounds of one call each.

    Whatever else runs on the machine only ever adds time, and adds it to a call of many small steps first; the
    median of the ratios, printed beside, tells how much of that there was.
    """

    def measure(candidate: Callable[[], object], baseline: Callable[[], object], rounds: int = 21) -> float:
        def seconds(call: Callable[[], object]) -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        for call in (candidate, baseline):
            call()
        pairs = [(seconds(candidate), seconds(baseline)) for _ in range(rounds)]
        best = min(x for x, _ in pairs) / min(x for _, x in pairs)
        median = statistics.median(x / y for x, y in pairs)
        print(f"\nratio of the fastest {best:.3f}, median of the ratios {median:.3f}")
        return best

    return measure


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
