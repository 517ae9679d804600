"""Options of `make bench`, and the file of what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import cpu
import pytest

RESULT = pytest.StashKey[cpu.Result]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks on a CPU")
    group.addoption("--long", action="store_true", help="the long races, and only those")
    group.addoption("--small", action="store_true", help="512 tokens, to try the command")
    group.addoption("--out", type=Path, default=Path("out/bench-cpu.json"), help="JSON file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    races = cpu.LONG if metafunc.config.getoption("long") else cpu.TABLE
    if metafunc.config.getoption("small"):
        races = tuple(race.small() for race in races)
    metafunc.parametrize("race", races, ids=[race.name for race in races])


@pytest.fixture
def result(pytestconfig: pytest.Config) -> cpu.Result:
    return pytestconfig.stash.setdefault(RESULT, cpu.Result())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the file if anything was measured."""
    if RESULT not in session.config.stash:
        return
    content = session.config.stash[RESULT].as_dict()
    out = session.config.getoption("out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    say = session.config.get_terminal_writer().line
    say()
    if content["growth"] is not None:
        say(f"the layer's time grows like T ** {content['growth']:.2f}")
    say(f"one decoded token of one layer: {content['counts']}")
    say(f"written: {out}")
