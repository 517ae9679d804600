"""`make bench`: what is wrong is not timed, and its numbers are computed by hand here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLUGINS = "-p", "no:hypothesispytest", "-p", "no:cacheprovider"


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it disables benchmarks
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu

    yield cpu
    sys.modules.pop("cpu")


def halved(calls, rounds):
    """Runs every call, and says that each takes twice as long as the one before it."""
    for call in calls:
        call()
    return [[(1 + turn / rounds) * 2**n for turn in range(rounds)] for n in range(len(calls))]


def test_a_race_checks_times_and_compares(cpu, monkeypatch):
    from measuring import attention_calls

    def wrong(q, k, v):
        return attention_calls.scaled_dot_product_attention(q, k, v, is_causal=True)

    race = cpu.Race("selected_attention", cpu.Shape(64, 2, 16), "both", (cpu.GATHER, cpu.SDPA))
    race = race._replace(baseline=cpu.SDPA, bounds={cpu.GATHER: 0.49})
    gather, everything = cpu.measure(race, halved)
    assert gather["peak_bytes"] > 3 * 64 * 2 * 16 * 4  # at least its three gradients
    assert gather["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert everything["seconds"] == 2 * gather["seconds"]
    assert "ratio" not in everything
    assert cpu.fails(gather)
    assert not cpu.fails(gather | {"bound": 0.51})
    assert not cpu.fails(everything)
    monkeypatch.setattr(attention_calls, "sdpa", wrong)
    gather, everything = cpu.measure(race, halved)
    assert "out: error" in everything["reason"]
    assert "seconds" not in everything
    assert "ratio" not in gather
    assert cpu.fails(everything)


def test_a_package_that_is_not_installed_is_no_failure(cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule.naive", None)
    race = cpu.Race("gated_delta_rule", cpu.Shape(64, 2, 16), "forward", (cpu.NAIVE,))
    [naive] = cpu.measure(race, halved)
    assert naive["reason"].startswith("NotHereError")
    assert not cpu.fails(naive)


def test_rounds_fit_the_time(cpu, monkeypatch):
    rounds = []

    def timer(calls, count):
        rounds.append(count)
        return halved(calls, count)

    race = cpu.Race("small ops", cpu.Shape(64, 2, 16), "forward", ("surprise", "compact"))
    for seconds in (1e3, 0):
        monkeypatch.setattr(cpu, "SECONDS", seconds)
        cpu.measure(race, timer)
    assert rounds == [21, 5]


def test_pytest_benchmark_times_the_first_call_and_the_others_around_it(cpu, pytester):
    pytester.makepyfile(
        """
        import time
        import cpu

        def test_order(benchmark):
            order = []
            def sleeper(name, seconds):
                return lambda: (order.append(name), time.sleep(seconds))
            calls = [sleeper("a", 0), sleeper("b", 0.01), sleeper("c", 0)]
            a, b, c = cpu.in_turns(benchmark, calls, 5)
            assert "".join(order) == "bca" "acb" "bca" "acb" "bca"
            assert benchmark.stats.stats.data == a
            assert len(a) == len(b) == len(c) == 5
            assert min(b) >= 0.01 > min(c)
        """
    )
    pytester.runpytest_inprocess("--benchmark-enable", *PLUGINS).assert_outcomes(passed=1)


def test_a_session_is_written_and_fails_with_a_race(cpu, pytester, monkeypatch):
    out, own = pytester.path / "new/bench.json", pytester.path / "own.json"
    written = "--out", out, "--benchmark-json", own
    chosen = BENCHMARKS, "--benchmark-enable", "--benchmark-only", "--small", "-k", "select_topk"
    pytester.runpytest_inprocess(*chosen, *PLUGINS, *written).assert_outcomes(passed=1)
    result = json.loads(out.read_text())
    late, early = result["measurements"]
    assert (late["case"], late["tokens"]) == (cpu.TOPK, 512)
    assert late["ratio"]["median"] > 0
    assert min(late["floor"], early["floor"]) > 0
    assert result["ceilings"]["bytes_per_second"] > 0
    assert result["counts"]["torch_ops"] > 0
    [benchmark] = json.loads(own.read_text())["benchmarks"]
    assert benchmark["extra_info"]["calls"] == result["measurements"]
    assert benchmark["stats"]["median"] == late["seconds"]
    monkeypatch.setattr(cpu, "fails", lambda one: True)
    failed = pytester.runpytest_inprocess(*chosen, *PLUGINS, *written)
    failed.assert_outcomes(failed=1)
    assert json.loads(out.read_text())["measurements"]


def test_growth_is_the_slope_between_logarithms(cpu):
    points = [{"what": "growth", "tokens": t, "seconds": 3 * t**1.5} for t in (64, 256, 4096)]
    assert cpu.growth(points) == pytest.approx(1.5)
    assert cpu.growth(points[:1]) is None


def test_every_race_of_the_table_names_calls_that_exist(cpu):
    for table in (cpu.TABLE, cpu.LONG):
        assert len({race.name for race in table}) == len(table)
    for race in (*cpu.TABLE, *cpu.LONG):
        small = race.shape._replace(tokens=16)
        assert set(race.calls) <= set(cpu.MAKERS[race.what](small, race.run))
        assert {*race.bounds, race.baseline} <= {*race.calls, None}
        assert race.calls[0] != race.baseline


def test_where_two_lines_cross(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    charts = pytest.importorskip("charts")
    flat, steep = [(1.0, 4.0), (16.0, 4.0)], [(1.0, 1.0), (16.0, 16.0)]
    assert charts.crossing(flat, steep) == pytest.approx(4.0)
    assert charts.crossing(steep, [(1.0, 2.0), (16.0, 32.0)]) is None
