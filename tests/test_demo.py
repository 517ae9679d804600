"""The demo, end to end on a small file with two steps: what it writes is what it measured."""

import json
import math

import pytest
from typer.testing import CliRunner

from hamblocks.cli import app


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"line {n}: the quick brown fox jumps over {n * n}\n" for n in range(4000))
    )
    return path


@pytest.mark.slow
def test_demo_writes_what_it_measured(text, tmp_path):
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
