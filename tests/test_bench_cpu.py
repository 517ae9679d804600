"""`make bench`: what is wrong is not timed, and its numbers are computed by hand here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu

    yield cpu
    sys.modules.pop("cpu")


def test_a_race_checks_times_and_compares(cpu, monkeypatch):
    from measuring import attention_calls
    from measuring.clock import Clock

    def wrong(q, k, v):
        return attention_calls.scaled_dot_product_attention(q, k, v, is_causal=True)

    race = cpu.Race("selected_attention", cpu.Shape(64, 2, 16), "both", (cpu.GATHER, cpu.SDPA))
    race = race._replace(baseline=cpu.SDPA, bounds={cpu.GATHER: 1e-9})
    gather, everything = cpu.measure(race, Clock("cpu", 2), 5)
    assert gather["seconds"] > 0
    assert gather["peak_bytes"] > 3 * 64 * 2 * 16 * 4  # at least its three gradients
    assert gather["ratio"]["low"] <= gather["ratio"]["median"] <= gather["ratio"]["high"]
    assert "ratio" not in everything
    assert cpu.is_above(gather)
    assert not cpu.is_above(gather | {"bound": 1e9})
    monkeypatch.setattr(attention_calls, "sdpa", wrong)
    gather, everything = cpu.measure(race, Clock("cpu", 2), 5)
    assert "out: error" in everything["reason"]
    assert "seconds" not in everything
    assert "ratio" not in gather


def test_growth_is_the_slope_between_logarithms(cpu):
    points = [{"what": "growth", "tokens": t, "seconds": 3 * t**1.5} for t in (64, 256, 4096)]
    assert cpu.growth(points) == pytest.approx(1.5)
    assert cpu.growth(points[:1]) is None


def test_every_race_of_the_table_names_calls_that_exist(cpu):
    for race in (*cpu.TABLE, *cpu.LONG):
        small = race.shape._replace(tokens=16)
        assert set(race.calls) <= set(cpu.MAKERS[race.what](small, race.run))
        assert {*race.bounds, race.baseline} <= {*race.calls, None}


def test_where_two_lines_cross(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    charts = pytest.importorskip("charts")
    flat, steep = [(1.0, 4.0), (16.0, 4.0)], [(1.0, 1.0), (16.0, 16.0)]
    assert charts.crossing(flat, steep) == pytest.approx(4.0)
    assert charts.crossing(steep, [(1.0, 2.0), (16.0, 32.0)]) is None
