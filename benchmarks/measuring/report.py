"""Prints what was measured as tables."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from hamblocks import info

REASON_WIDTH = 60
"""Characters of a reason that a table shows; the JSON file has all of it."""
FILE_WIDTH = 180
"""Columns of the tables if they go into a file or a pipe."""


def machine(gpu: bool) -> dict[str, str]:
    """The GPU, its driver, and the versions of packages."""
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


def tables(measurements: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> list[Table]:
    """Times beside floors and estimates, and targets beside the ratios that were reached."""
    times = Table(
        "part", "T", "pass", "case", "kept", "ms", "quartiles", "floor", "x floor", "estimate",
        "x estimate", "host ms", "peak MB", "launches", title="Times",
    )  # fmt: skip
    for measured in measurements:
        times.add_row(*name_cells(measured), *time_cells(measured))
    judged = Table("target", "T", "pass", "bound", "ratio", "met", title="Targets")
    for one in verdicts:
        which = " ".join(one[name] for name in ("pass", "mode") if name in one)
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.3f}"
        met = {True: "yes", False: "no", None: "not measured"}[one["met"]]
        judged.add_row(one["target"], f"{one['tokens']:,}", which, f"{one['bound']:g}", ratio, met)
    return [times, judged]


def name_cells(measured: dict[str, Any]) -> list[str]:
    """Part, T, pass, case and keep fraction."""
    return [
        measured["part"],
        f"{measured['tokens']:,}",
        measured.get("pass", "one token"),
        " ".join(str(measured[name]) for name in ("case", "mode", "variant") if name in measured),
        f"{measured['kept']:.3f}" if "kept" in measured else str(measured.get("fraction", "")),
    ]


def time_cells(measured: dict[str, Any]) -> list[str]:
    """Median, quartiles, floor and estimate in milliseconds; the reason if there is no time."""
    if "seconds" not in measured:
        return ["-", measured.get("reason", "right")[:REASON_WIDTH]]
    low, middle, high, floor = (
        1e3 * measured[name] for name in ("lower", "seconds", "upper", "floor")
    )
    return [
        f"{middle:.3f}",
        f"{low:.3f} - {high:.3f}",
        f"{floor:.3f}",
        f"{middle / floor:.2f}",
        f"{1e3 * measured['estimate']:.3f}" if "estimate" in measured else "-",
        f"{measured['of_estimate']:.2f}" if "estimate" in measured else "-",
        f"{1e3 * measured['host_seconds']:.3f}",
        f"{measured['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in measured else "-",
        str(measured.get("launches", "-")),
    ]


def show(measurements: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    """Prints both tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    for table in tables(measurements, verdicts):
        console.print(table)
