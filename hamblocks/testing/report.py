"""Results of checks as a table on a terminal, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hamblocks.testing.check import Result

COLOURS = {"pass": "green", "fail": "red", "not applicable": "dim", "not run": "yellow"}
"""Of the outcomes of a check."""


def show(console: Console, called: str, results: Sequence[Result]) -> None:
    """Prints a table of one part's results, then the message of every failure."""
    table = Table(
        title=escape(called), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("check", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold")
    for result in results:
        colour = COLOURS[result.outcome]
        ran = result.outcome in ("pass", "fail")
        remark = f"{result.seconds:.1f} s" if ran else escape(result.reason)
        table.add_row(result.check, f"[{colour}]{result.outcome}[/]", f"[dim]{remark}[/]")
    console.print(table)
    for result in results:
        if result.outcome == "fail":
            console.print(f"\n[red]{escape(result.reason)}[/]", soft_wrap=True, highlight=False)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in COLOURS}
    seconds = sum(result.seconds for result in results)
    not_run = f", {counts['not run']} not run" if counts["not run"] else ""
    console.print(
        f"\n{counts['pass']} passed, {counts['fail']} failed, "
        f"{counts['not applicable']} not applicable{not_run} in {seconds:.1f} s",
        style="red" if counts["fail"] else "green",
        highlight=False,
    )


def as_json(
    kind: str, called: str, profile: str, seed: int | None, results: Sequence[Result]
) -> dict[str, Any]:
    """The results of one part as a JSON object."""
    return {
        "kind": kind,
        "part": called,
        "profile": profile,
        "seed": seed,
        "failed": sum(result.outcome == "fail" for result in results),
        "results": [result._asdict() for result in results],
    }
