"""For `make mutants`. As a plugin of pytest: of each mutant the tests that matter, the quick ones first, and no failing
case made smaller. As a script in mutmut's folder: how many mutants of each file were killed, and which were not."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis.internal.conjecture import engine

MATTER = {
    "hamblocks_ops.gated_delta_rule": r"gated_delta_rule",
    "hamblocks_ops.paged_attention": r"paged_attention",
    "hamblocks_ops.select": r"test_select\.py|\((select_|compact)",
    "hamblocks_ops.select.reference": r"selected_attention",
    "hamblocks_ops.selected_attention": r"selected_attention",
    "hamblocks_ops.surprise": r"surprise",
    "hamblocks.ledger": r"test_selectors\.py|test_selectors.*(split|packed|padding|rows)",
    "hamblocks.selectors": r"test_selectors\.py|test_bad_input|test_selectors.*(shape|split|packed|padding|rows|equal)",
}
SLOW = r"compile|test_layers|test_memory|small_|registered_well|chunked.*(float32|finite|gradients)|unwritten_memory"


def pytest_configure() -> None:
    engine.MAX_SHRINKS = 1
    os.register_at_fork(
        before=gc.freeze
    )  # a mutant's process shall not walk, hence copy, what it inherits


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mutant = os.environ.get("MUTANT_UNDER_TEST", "")
    matter = [tests for module, tests in MATTER.items() if mutant.startswith(f"{module}.")]
    wanted = re.compile("|".join(["test_bad_arguments", *(matter or MATTER.values())]))
    every = list(items)
    items[:] = [
        item for item in every if wanted.search(item.nodeid) and not re.search(SLOW, item.nodeid)
    ]
    config.hook.pytest_deselected(items=[item for item in every if item not in items])
    measured = Path("mutmut-stats.json")  # by mutmut, of a run without mutants
    if measured.exists():
        seconds = json.loads(measured.read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0))


def report(least: float) -> bool:
    """Prints a table; whether at least that share was killed. What ran out of time counts as killed."""
    from mutmut.stats import status_by_exit_code

    total = dead = 0
    for file in sorted(Path("mutants").rglob("*.meta")):
        fate = {
            name: status_by_exit_code[code]
            for name, code in json.loads(file.read_text())["exit_code_by_key"].items()
        }
        left = [name for name, status in fate.items() if status not in ("killed", "timeout")]
        if fate:
            print(
                f"{file.relative_to('mutants').with_suffix('')}: {len(fate) - len(left)} of {len(fate)} killed"
            )
            print(*(f"    {name}: {fate[name]}" for name in left), sep="\n")
        total, dead = total + len(fate), dead + len(fate) - len(left)
    print(f"{dead} of {total} mutants killed: {dead / total:.1%}, expected {least:.0%}")
    return dead >= least * total


if __name__ == "__main__":
    raise SystemExit(not report(0.9))
