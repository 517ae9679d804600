"""The demo, end to end with tiny settings: what it writes is what it measured."""

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hamblocks.cli import app
from hamblocks.experiments import demo
from hamblocks.experiments.arms import ARMS
from hamblocks.experiments.models import LayerOptions

TINY = demo.Settings(
    seeds=(0, 1),
    steps=2,
    elastic_steps=3,
    curriculum_steps=3,
    memory_steps=3,
    pairs=4,
    length=40,
    questions=4,
    symbols=40,
    burst=2,
    sequences=4,
    workers=0,
    sizes=LayerOptions(hidden_size=16, head_dim=8),
)


@pytest.fixture
def tiny(monkeypatch):
    """The command with tiny models; seeds and steps are those that it asks for."""
    asked = []

    def settings(**given):
        asked.append(given)
        return replace(TINY, **given)

    monkeypatch.setattr(demo, "Settings", settings)
    return asked


@pytest.mark.slow
def test_demo_writes_what_it_measured(tiny, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--seed", "3", "--steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert tiny[0] == {"seeds": (3, 4, 5)}
    found = json.loads((out / "results.json").read_text())
    recall = found["recall"]
    assert recall["seeds"] == [3, 4, 5]
    assert set(recall) == {*ARMS, "seeds"}
    assert all(len(recall[arm]) == 3 for arm in ARMS)
    runs = {(run["arm"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == len(found["runs"]) == 3 * len(ARMS) + 1
    for arm in ARMS:
        for accuracy, seed in zip(recall[arm], recall["seeds"], strict=True):
            measured = [runs[arm, seed]["measured"]["accuracy"]]
            if (arm, seed) == ("memory", 3):
                measured.append(runs["memory from the start", 3]["measured"]["accuracy"])
            assert accuracy == max(measured)
            assert runs[arm, seed]["trained"]["steps"] == (4 if arm == "elastic" else 2)
    stored = {arm: runs[arm, 3]["measured"]["keep_fraction"] for arm in ARMS}
    assert (stored["everything"], stored["memory"]) == (1, 0)
    elastic = found["elastic"]
    assert elastic["fractions"] == list(demo.FRACTIONS)
    for seed in recall["seeds"]:
        kept = elastic["stored"][str(seed)]
        assert kept == sorted(kept)
        assert (kept[0], kept[-1]) == (0, 1)
        at_target = elastic["accuracy"][str(seed)][demo.FRACTIONS.index(0.25)]
        assert at_target == recall["elastic"][recall["seeds"].index(seed)]
        own, moved = found["growth"][str(seed)]
        assert len(moved["tokens"]) == len(moved["fresh"]) == len(moved["repeated"])
        assert math.isfinite(own["ratio"])
    picture = found["picture"]
    assert len(picture["kind"]) == len(picture["score"]) == len(picture["stored"])
    markdown = (out / "table.md").read_text()
    for (_, _), run in runs.items():
        accuracy = f"{run['measured']['accuracy']:.3f}"
        assert accuracy in result.output
        assert f"| {accuracy} |" in markdown
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_quick_takes_one_seed(tiny, tmp_path):
    result = CliRunner().invoke(app, ["demo", "--quick", "--steps", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert tiny[0] == {"seeds": (0,)}
    assert json.loads((tmp_path / "results.json").read_text())["recall"]["seeds"] == [0]


@pytest.mark.slow
def test_workers_find_what_one_process_finds():
    one = replace(TINY, seeds=(0,))
    here, there = (demo.run(replace(one, workers=n), lambda *_: None) for n in (0, 2))
    accuracies = [[run.measured for run in found.runs] for found in (here, there)]
    assert accuracies[0] == accuracies[1]
    assert here.budgets == there.budgets
    assert here.growth == there.growth


@pytest.mark.parametrize(
    ("given", "name"),
    [({"seeds": ()}, "seeds"), ({"seeds": (1, 1)}, "seeds"), ({"steps": 0}, "steps")],
)
def test_settings_out_of_range_are_refused(given, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        demo.Settings(**given)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"line {n}: the quick brown fox jumps over {n * n}\n" for n in range(4000))
    )
    return path


@pytest.mark.slow
def test_text_models_write_what_they_measured(text, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["demo", "--text", str(text), "--steps", "2", "--seed", "3", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["steps"] == 2
    assert found["settings"]["seed"] == 3
    assert found["source"] == "text.txt"
    memory, everything, ham, chance = found["models"]
    assert memory["keep_fraction"] == memory["cache_bytes_per_token"] == 0
    assert everything["keep_fraction"] == 1
    assert (
        everything["cache_bytes_per_token"] == 2 * 2 * 128 * 4
    )  # layers, keys and values, hidden size, float32
    assert ham["name"] == "HAM, 25%"
    assert chance["keep_fraction"] == pytest.approx(0.25, abs=0.1)
    assert all(0 < row["bits_per_byte"] < 9 and row["seconds"] > 0 for row in found["models"])
    kept = [row["keep_fraction"] for row in found["trade_off"]]
    assert kept == sorted(kept)
    assert kept[0] < 0.04  # the window's own
    assert kept[-1] == 1
    for growth in found["growth"]:
        assert growth["stored"] == sorted(growth["stored"])
        assert all(
            0 <= stored <= seen
            for seen, stored in zip(growth["tokens"], growth["stored"], strict=True)
        )
    for row in found["models"]:
        assert f"{row['bits_per_byte']:.3f}" in result.output
        assert f"| {row['name']} | {row['bits_per_byte']:.3f} |" in (out / "table.md").read_text()
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(found["seconds"])


def test_a_text_too_short_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    result = CliRunner().invoke(app, ["demo", "--text", str(path)])
    assert result.exit_code == 2
    assert "100,000" in result.output


def test_steps_must_be_positive(text):
    result = CliRunner().invoke(app, ["demo", "--text", str(text), "--steps", "0"])
    assert result.exit_code == 2
    assert "--steps" in result.output


def test_quick_is_for_recall(text):
    result = CliRunner().invoke(app, ["demo", "--text", str(text), "--quick"])
    assert result.exit_code == 2
    assert "--quick" in result.output
