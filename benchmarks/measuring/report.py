"""What was measured, as tables."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from hamblocks import info


def machine(gpu: bool) -> dict[str, str]:
    """The GPU, its driver, and versions."""
    found = {**info.machine(), "flash-attn-3": "not installed"}
    for package in ("flash-attn-3", "flash_attn_3"):
        try:
            found["flash-attn-3"] = version(package)
        except PackageNotFoundError:
            continue
    if gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(
                query, check=True, capture_output=True, text=True
            ).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError) as error:
            found["driver"] = f"unknown ({type(error).__name__})"
    return found


def tables(rows: list[dict[str, Any]], judged: list[dict[str, Any]]) -> list[Table]:
    """Times beside their floors, and targets beside what was reached."""
    times = Table(
        "part", "T", "pass", "case", "kept", "ms", "quartiles", "floor", "x floor", title="Times"
    )
    for row in rows:
        names = [
            row["part"],
            f"{row['tokens']:,}",
            row.get("pass", "one token"),
            " ".join(str(row[n]) for n in ("case", "mode") if n in row),
            f"{row['kept']:.3f}" if "kept" in row else str(row.get("fraction", "")),
        ]
        if "seconds" in row:
            low, middle, high, floor = (
                1e3 * row[name] for name in ("lower", "seconds", "upper", "floor")
            )
            times.add_row(
                *names,
                f"{middle:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{floor:.3f}",
                f"{middle / floor:.2f}",
            )
        else:
            times.add_row(*names, "-", row["reason"][:60])
    verdicts = Table("target", "T", "pass", "bound", "ratio", "met", title="Targets")
    for x in judged:
        which = " ".join(x[name] for name in ("pass", "mode") if name in x)
        ratio = "-" if x["ratio"] is None else f"{x['ratio']:.3f}"
        met = {True: "yes", False: "no", None: "not measured"}[x["met"]]
        verdicts.add_row(x["target"], f"{x['tokens']:,}", which, f"{x['bound']:g}", ratio, met)
    return [times, verdicts]


def show(rows: list[dict[str, Any]], judged: list[dict[str, Any]]) -> None:
    """Prints both."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in tables(rows, judged):
        console.print(table)
