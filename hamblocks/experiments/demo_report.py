"""Shows what the main job found: a table with every seed, the same in Markdown, and a chart."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from rich.table import Table

from hamblocks.experiments.arms import ARMS
from hamblocks.experiments.demo import FRACTIONS, Results
from hamblocks.experiments.tasks import FILLER, KEY, QUESTION, VALUE

TITLES = {
    "everything": "attention over everything",
    "memory": "memory alone",
    "memory from the start": "memory alone, trained from the start",
    "surprise": "HAM: what surprises the memory",
    "random": "random tokens",
    "router": "learned router",
    "elastic": "HAM, one model for every budget",
}

COLORS = {
    "everything": "#222222",
    "memory": "#888888",
    "surprise": "#cc4400",
    "random": "#75507b",
    "router": "#4e9a06",
    "elastic": "#3465a4",
}


def _rows(results: Results) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Column titles, the rows of the arms, and those of the elastic model's budgets."""
    seeds = results.settings.seeds
    titles = ["stored", *(f"seed {seed}" for seed in seeds), "mean", "fraction", "seconds"]
    arms = []
    for arm, title in TITLES.items():
        runs = {run.seed: run for run in results.runs if run.arm == arm}
        if not runs:
            continue
        found = [run.measured for run in runs.values()]
        name = f"{title}, at {results.settings.target:.0%}" if arm == "elastic" else title
        arms.append(
            [
                name,
                *(f"{runs[s].measured.accuracy:.3f}" if s in runs else "" for s in seeds),
                f"{fmean(m.accuracy for m in found):.3f}",
                f"{fmean(m.keep_fraction for m in found):.3f}",
                f"{fmean(run.trained.seconds for run in runs.values()):.0f}",
            ]
        )
    budgets = []
    for place, fraction in enumerate(FRACTIONS):
        moved = [results.budgets[seed][place] for seed in seeds if seed in results.budgets]
        if moved:
            budgets.append(
                [
                    f"that model, moved to {fraction:.1%}",
                    *(f"{m.accuracy:.3f}" for m in moved),
                    f"{fmean(m.accuracy for m in moved):.3f}",
                    f"{fmean(m.keep_fraction for m in moved):.3f}",
                    "",
                ]
            )
    return titles, arms, budgets


def table(results: Results) -> Table:
    """A table of the arms and of the elastic model at every budget."""
    settings = results.settings
    titles, arms, budgets = _rows(results)
    view = Table(
        title=f"Answers right, held out: {settings.pairs} pairs in {settings.length} tokens, "
        f"{results.parameters:,} parameters"
    )
    for place, title in enumerate(titles):
        view.add_column(title, justify="right" if place else "left")
    for row in arms:
        view.add_row(*row)
    view.add_section()
    for row in budgets:
        view.add_row(*row)
    return view


def markdown(results: Results) -> str:
    """The same table in Markdown."""
    titles, arms, budgets = _rows(results)
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in [*arms, *budgets]]
    return "\n".join(lines) + "\n"


def growth_lines(results: Results) -> list[str]:
    """One line for each threshold: fresh over repeated, every seed."""
    rows = list(results.growth.values())
    return [
        f"Stored of fresh symbols over stored of 32 repeated ones, at {columns[0]['threshold']}: "
        + ", ".join(f"{row['ratio']:.1f}" for row in columns)
        for columns in zip(*rows, strict=True)
    ]


def chart(results: Results, path: Path) -> None:
    """Writes a PNG: accuracy against what is stored, growth of the cache, and one sequence.

    The panels stand below each other, so that a phone shows them legibly. Error bars reach from the
    worst seed to the best.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(5.6, 8.4), constrained_layout=True)
    accuracy, growth, sequence = figure.subplots(3, height_ratios=(1.45, 1, 0.75))
    _draw_accuracy(accuracy, results)
    _draw_growth(growth, results)
    _draw_sequence(sequence, results)
    seeds = ", ".join(map(str, results.settings.seeds))
    figure.suptitle(
        f"Recall: {results.settings.pairs} pairs in {results.settings.length} tokens; "
        f"{results.parameters:,} parameters;\nseeds {seeds}; bars from the worst to the best",
        x=0.01,
        ha="left",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _bar(values: list[float]) -> tuple[float, list[list[float]]]:
    middle = fmean(values)
    return middle, [[middle - min(values)], [max(values) - middle]]


def _draw_accuracy(axes: Any, results: Results) -> None:
    budgets = list(zip(*results.budgets.values(), strict=True))
    if budgets:
        middles = [_bar([m.accuracy for m in row]) for row in budgets]
        axes.errorbar(
            [fmean(m.keep_fraction for m in row) for row in budgets],
            [middle for middle, _ in middles],
            yerr=[[bar[side][0] for _, bar in middles] for side in range(2)],
            fmt="o-",
            color=COLORS["elastic"],
            capsize=3,
            markersize=4,
            label=TITLES["elastic"],
        )
    for arm, marker in zip(ARMS[:5], "svD*X", strict=True):
        found = [run.measured for run in results.runs if run.arm == arm]
        middle, bar = _bar(results.accuracy(arm))
        axes.errorbar(
            fmean(m.keep_fraction for m in found),
            middle,
            yerr=bar,
            fmt=marker,
            color=COLORS[arm],
            capsize=4,
            markersize=6 if arm == "router" else 11,  # both may stand where random does
            label=TITLES[arm],
            zorder=3,
        )
    axes.set_xlabel("stored tokens / tokens")
    axes.set_ylabel("answers right, held out")
    axes.set_title("What storing buys", loc="left")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center right")


def _draw_growth(axes: Any, results: Results) -> None:
    rows = [row[-1] for row in results.growth.values()]
    axes.set_title("How the cache grows", loc="left")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("tokens stored")
    axes.grid(alpha=0.25)
    if not rows:
        return
    tokens = rows[0]["tokens"]
    for name, label, color in (
        ("fresh", "fresh symbols", COLORS["surprise"]),
        ("repeated", "32 symbols, repeated", COLORS["elastic"]),
    ):
        curves = list(zip(*(row[name] for row in rows), strict=True))
        axes.plot(tokens, [fmean(column) for column in curves], color=color, label=label)
        lowest, highest = [min(column) for column in curves], [max(column) for column in curves]
        axes.fill_between(tokens, lowest, highest, color=color, alpha=0.2, linewidth=0)
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=8.5, title=f"at {rows[0]['threshold']}")


def _draw_sequence(axes: Any, results: Results, shown: int = 160) -> None:
    picture = results.picture
    axes.set_title("One sequence, and what HAM stored of it", loc="left")
    if not picture:
        return
    # the first pairs, with some text before them
    kinds = picture["kind"]
    first = max(kinds.index(KEY) - 16, 0)
    window = range(first, min(first + shown, len(kinds)))
    names = {FILLER: "repeated text", KEY: "key", VALUE: "value", QUESTION: "question"}
    colors = {FILLER: "#bbbbbb", KEY: "#edd400", VALUE: "#cc4400", QUESTION: "#3465a4"}
    for kind, name in names.items():
        at = [t for t in window if kinds[t] == kind]
        if at:
            axes.bar(at, [picture["score"][t] for t in at], 1.0, color=colors[kind], label=name)
    stored = [t for t in window if picture["stored"][t]]
    axes.plot(stored, [-0.05] * len(stored), "|", color="#222222", markersize=7, label="stored")
    axes.set_xlabel("token")
    axes.set_ylabel("surprise")
    axes.set_xlim(first - 1, window[-1] + 1)
    axes.set_ylim(top=1.3 * max(picture["score"][t] for t in window))  # room for the legend
    axes.legend(
        frameon=False, fontsize=8, ncols=5, loc="upper right", columnspacing=0.9, handlelength=1.2
    )
