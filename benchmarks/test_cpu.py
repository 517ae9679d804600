"""A benchmark for each race of `cpu.TABLE`."""

from __future__ import annotations

from functools import partial

import cpu
import pytest
from pytest_benchmark.fixture import BenchmarkFixture


def test_race(race: cpu.Race, benchmark: BenchmarkFixture, result: cpu.Result) -> None:
    if not benchmark.enabled:
        pytest.fail("expected --benchmark-enable, and one process")
    benchmark.group = race.what
    measured = result.add(race, partial(cpu.in_turns, benchmark))
    benchmark.extra_info["calls"] = measured
    for one in measured:
        print(cpu.line(one))
    failed = [cpu.line(one) for one in measured if cpu.fails(one)]
    assert not failed, "\n".join(failed)
