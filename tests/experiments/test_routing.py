"""The study, end to end with tiny settings: jobs, what is resumed, tables and charts."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.experiments import routing
from hamblocks.experiments.gates import EvenlySpaced
from hamblocks.experiments.models import POLICIES, LayerOptions
from hamblocks.experiments.routing_report import (
    charts,
    interval,
    markdown,
    trade_off,
    trade_off_lines,
)
from hamblocks.experiments.tasks import InContextCopying, Recall
from hamblocks.experiments.training import run as run_model

SMALL = LayerOptions(hidden_size=16, head_dim=8)
TINY = routing.Settings(
    seeds=(5, 6),
    tasks=("recall", "in-context copying"),
    policies=("surprise", "oracle", "periodic"),
    options=("as in the study", "not annealed"),
    steps=2,
    curriculum_steps=2,
    sequences=2,
    workers=0,
)


@pytest.fixture
def small(monkeypatch):
    """Small tasks and models under the names of the study."""
    recall = routing.TaskSetting(lambda _: Recall(4, 40, symbols=40, burst=2), SMALL)
    copying = routing.TaskSetting(lambda _: InContextCopying(4, 32, symbols=16, phrase=4), SMALL)
    tasks = routing.TASKS | {"recall": recall, "in-context copying": copying}
    monkeypatch.setattr(routing, "TASKS", tasks)


def _quiet(*_):
    pass


@pytest.mark.slow
def test_every_job_is_run_once_and_a_later_run_goes_on(small, tmp_path):
    first = routing.run(replace(TINY, seeds=(5,)), tmp_path / "one", _quiet)
    done = []
    results = routing.run(TINY, tmp_path / "all", lambda *told: done.append(told[3]))
    assert len(done) == len(set(done)) == 2 * (2 + 2)
    # a seed gives the same numbers whatever is run beside it
    for task in TINY.tasks:
        assert results["tasks"][task]["5"]["arms"] == first["tasks"][task]["5"]["arms"]
    for path in (tmp_path / "all").glob("option.*.6.json"):
        path.unlink()
    again = []
    resumed = routing.run(TINY, tmp_path / "all", lambda *told: again.append(told[3]))
    assert len(again) == 2
    assert resumed["tasks"] == results["tasks"]
    with pytest.raises(ValueError, match=r"^out: expected an empty folder, .*, got steps"):
        routing.run(replace(TINY, steps=3), tmp_path / "all", _quiet)


def test_policies_store_what_the_budget_says(small, tmp_path):
    results = routing.run(replace(TINY, seeds=(5,), options=()), tmp_path, _quiet)
    arms = results["tasks"]["recall"]["5"]["arms"]
    assert set(arms) == {"everything", "memory", *TINY.policies}
    assert [arms[arm][0]["keep_fraction"] for arm in ("everything", "memory")] == [1, 0]
    for arm in TINY.policies:
        stored = [row["keep_fraction"] for row in arms[arm]]
        assert stored == sorted(stored)
        assert stored[-1] == 1
    # the oracle stores what is needed first
    needed = [row["kept_labelled"] for row in arms["oracle"]]
    assert needed[routing.FRACTIONS.index(0.5)] == 1


@pytest.mark.slow
def test_tables_and_charts_show_every_seed(small, tmp_path):
    results = routing.run(TINY, tmp_path, _quiet)
    text = markdown(results)
    for task in TINY.tasks:
        assert f"### {task.capitalize()}" in text
        for arm in ("everything", "memory", *TINY.policies):
            rows = [results["tasks"][task][seed]["arms"][arm] for seed in ("5", "6")]
            place = min(routing.FRACTIONS.index(0.25), len(rows[0]) - 1)
            values = ", ".join(f"{row[place]['accuracy']:.3f}" for row in rows)
            assert f"- {arm}: {values}" in text
    for option in TINY.options:
        assert f"| {option} |" in text
    paths = charts(results, tmp_path)
    assert [path.name for path in paths] == [
        f"routing-{task}{kind}.png"
        for task in ("recall", "in-context-copying")
        for kind in ("", "-growth")
    ]
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.slow
def test_growth_at_every_budget_is_set_against_what_the_budget_costs(small, tmp_path):
    results = routing.run(replace(TINY, tasks=("recall",), options=()), tmp_path, _quiet)
    _, cost, ratios = trade_off(results, "recall")
    quarter = routing.FRACTIONS.index(0.25)
    seeds = results["tasks"]["recall"].values()
    assert cost[quarter] == [0, 0]
    assert cost[0] == [
        seed["arms"]["surprise"][quarter]["accuracy"] - seed["arms"]["surprise"][0]["accuracy"]
        for seed in seeds
    ]
    # one layer is the whole cache; with everything stored both inputs are
    assert ratios["the cache"] == ratios["layer 0"]
    assert ratios["the cache"][-1] == pytest.approx([1, 1], rel=0.2)
    for seed, ratio in zip(seeds, ratios["the cache"][quarter], strict=True):
        growth = seed["growth"]
        after = growth["tokens"].index(64)
        late = [growth[name][0][-1] - growth[name][0][after] for name in ("fresh", "repeated")]
        assert ratio == pytest.approx(late[0] / max(late[1], 1 / 16))
    text = "\n".join(trade_off_lines(results, "recall"))
    assert "| 25% | 0.000 ± 0.000 |" in text
    assert f"every seed (5, 6): {ratios['the cache'][quarter][0]:.2f}, " in text
    # a seed in which only the growth at one budget is known has no part in it
    del results["tasks"]["recall"]["5"]["growth"]["budgets"]
    assert trade_off(results, "recall").seeds == ["6"]
    assert trade_off(results, "recall").cost == [row[1:] for row in cost]


@pytest.mark.slow
def test_the_command_writes_all_of_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(routing.Settings, "quick", classmethod(lambda _: TINY))
    given = ["experiment", "routing", "--quick", "--seeds", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/routing.json").read_text())
    assert found["settings"]["seeds"] == [1000]
    assert (tmp_path / "out/routing.md").read_text().startswith("### Recall")
    wrong = CliRunner().invoke(app, ["experiment", "rooting"])
    assert wrong.exit_code == 2
    assert "expected routing" in " ".join(wrong.output.split())


def test_unknown_names_are_refused():
    for name in ("tasks", "policies", "options"):
        with pytest.raises(ValueError, match=rf"^{name}: expected some of .*, got rooting"):
            routing.Settings(**{name: ("rooting",)})


def test_the_interval_is_students():
    mean, width = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert width == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-4)
    assert math.isnan(interval([1.0])[1])


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_evenly_spaced_tokens_have_at_most_three_distances(share):
    position = torch.arange(3000, dtype=torch.int32)[None]
    x = torch.zeros(1, 3000, 4)
    trace = hb.MemoryTrace(x[..., None, :], x[..., None, :], None, None, None, position)
    score = EvenlySpaced()(x, trace).score[0, :, 0]
    stored = (score >= 1 - share).nonzero()[:, 0]
    assert len(stored) == pytest.approx(3000 * share, abs=3)
    assert len(stored.diff().unique()) <= 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_of_every_policy_runs(policy):
    from hamblocks.experiments.models import model_of

    task = Recall(4, 40, symbols=40, burst=2)
    model = model_of(task, SMALL, POLICIES[policy], lambda: hb.ElasticFraction(), seed=0)
    batch = task.batch(2, torch.Generator().manual_seed(0))
    assert run_model(model, batch).logits.shape == (*batch.tokens.shape, task.vocab_size)


@pytest.mark.parametrize("option", routing.OPTIONS)
def test_a_layer_with_every_option_runs(option):
    options = replace(SMALL, **routing.OPTIONS[option])
    layer = options.layer(hb.PredictionError(), 0.5)
    assert layer(torch.randn(2, 5, 16)).y.shape == (2, 5, 16)
