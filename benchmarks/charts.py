"""Draws the result of `make bench`.

    python benchmarks/charts.py [RESULT.json ...] [--out FILE.png]

Four panels: attention against the keep fraction, attention and the delta rule against T, and the
layer against T, with the length from which on the layer with memory is cheaper than attention over
everything. A dotted line is a floor: the least time at the rates that the same run measured.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Measured = dict[str, Any]


def crossing(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float | None:
    """The T from which on `one` takes less time than `other`, between points on a log scale.

    None if the order never changes from slower to faster.
    """
    theirs = dict(other)
    gaps = [(x, math.log(took / theirs[x])) for x, took in sorted(one) if x in theirs]
    for (x, before), (y, after) in pairwise(gaps):
        if before > 0 >= after:
            return float(x * (y / x) ** (before / (before - after)))
    return None


def series(measured: list[Measured], x: str, value: str = "seconds") -> list[tuple[float, float]]:
    """Points in the order of x; the last measurement of an x counts."""
    return sorted({one[x]: one[value] for one in measured}.items())


def draw_lines(axes: Any, measured: list[Measured]) -> None:
    """Times against T, a line for each call, and the floors."""
    for number, case in enumerate(dict.fromkeys(one["case"] for one in measured)):
        own = [one for one in measured if one["case"] == case]
        color = f"C{number}"
        axes.plot(*zip(*series(own, "tokens"), strict=True), "o-", color=color, label=case)
        floors = series(own, "tokens", "floor")
        axes.plot(*zip(*floors, strict=True), ":", color=color, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="T", ylabel="seconds")
    axes.legend(frameon=False, fontsize=8)


def draw(measurements: list[Measured]) -> Figure:
    """The figure of the measurements of one or several results."""
    timed = [one for one in measurements if "seconds" in one]

    def of(what: str, run: str) -> list[Measured]:
        return [one for one in timed if (one["what"], one["pass"]) == (what, run)]

    # below each other: a phone shows them legibly
    figure = Figure(figsize=(5.6, 11.2), layout="constrained")
    fractions, attention, delta, layer = figure.subplots(4)

    for run, style in (("forward", "o-"), ("both", "s-")):
        gather = [one for one in of("selected_attention", run) if one["case"] == "gather"]
        longest = max((one["tokens"] for one in gather), default=0)
        ratios = {
            one["fraction"]: one["ratio"]["median"]
            for one in gather
            if one["tokens"] == longest and "ratio" in one
        }
        if ratios:
            label = "forward" if run == "forward" else "forward and backward"
            fractions.plot(*zip(*sorted(ratios.items()), strict=True), style, label=label)
    fractions.plot([0, 1], [0, 1], ":", color="0.4", label="what is kept")
    fractions.axhline(1, color="0.7", linewidth=0.8)
    fractions.set(
        title="Selected attention at the longest T",
        xlabel="keep fraction",
        ylabel="time / attention\nover everything",
    )
    fractions.legend(frameon=False, fontsize=8)

    quarter = [one for one in of("selected_attention", "both") if one["fraction"] == 0.25]
    draw_lines(attention, quarter)
    attention.set_title("Attention, forward and backward, a quarter stored")
    draw_lines(delta, of("gated_delta_rule", "both"))
    delta.set_title("Delta rule, forward and backward")

    layers = [one for one in of("layer", "both") if one["fraction"] == 0.25]
    draw_lines(layer, layers)
    lines = {
        case: series([one for one in layers if one["case"] == case], "tokens")
        for case in ("HAM", "attention over everything, no memory")
    }
    crossed = crossing(*lines.values())
    title = "Layer, forward and backward, a quarter stored"
    if crossed is not None:
        layer.axvline(crossed, color="0.4", linewidth=0.8, linestyle="--")
        title += f"\ncheaper than attention over everything from T = {crossed:,.0f}"
    layer.set_title(title)
    for axes in (fractions, attention, delta, layer):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="*", default=[Path("out/bench-cpu.json")])
    parser.add_argument("--out", type=Path, default=Path("out/bench-cpu.png"))
    given = parser.parse_args()
    measurements = [
        one for path in given.results for one in json.loads(path.read_text())["measurements"]
    ]
    draw(measurements).savefig(given.out, dpi=180)
    print(given.out)


if __name__ == "__main__":
    main()
