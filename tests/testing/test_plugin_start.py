"""The pytest plugin in suites that do not use it: no import, no cost, no failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "hypothesis", "hamblocks.testing", "hamblocks_ops")


def suite(path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the suite in a folder by a pytest of its own, without the plugin of hypothesis."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", *options]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=path, env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_is_imported_until_a_suite_uses_it(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import sys\n"
        "def test_mine(request):\n"
        "    assert request.config.pluginmanager.has_plugin('hamblocks')\n"
        f"    assert not set({HEAVY!r}) & sys.modules.keys()\n"
    )
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_suite_runs_without_hypothesis(tmp_path):
    stub = tmp_path / "stub/hypothesis/__init__.py"
    stub.parent.mkdir(parents=True)
    stub.write_text("raise ModuleNotFoundError(\"No module named 'hypothesis'\")\n")
    (tmp_path / "test_mine.py").write_text("def test_mine(): assert True\n")
    path = os.pathsep.join([str(stub.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = suite(tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = suite(tmp_path, "--hamblocks-profile", "ci", PYTHONPATH=path)
    assert asked.returncode == 4
    assert "pip install 'hamblocks[test]'" in asked.stderr


@pytest.mark.slow
def test_an_empty_suite_is_collected_as_fast_as_without_the_plugin(tmp_path):
    """Within 50 ms or a tenth, in CPU time: other processes disturb it less than the clock's."""
    seconds: dict[tuple[str, ...], list[float]] = {(): [], ("-p", "no:hamblocks"): []}
    for _ in range(9):
        for options, measured in seconds.items():
            before = os.times()
            suite(tmp_path, "--collect-only", *options)
            after = os.times()
            measured.append(sum(after[2:4]) - sum(before[2:4]))
    with_plugin, without = (min(measured) for measured in seconds.values())
    assert with_plugin - without < max(0.05, 0.1 * without)
