"""Shows what the study found: a table and a chart for each task, and one table of options."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 %, by degrees of freedom (at 0: there is no interval)."""

COLORS = {
    "everything": "#222222",
    "memory": "#888888",
    "surprise": "#cc4400",
    "committed write": "#f57900",
    "random": "#75507b",
    "periodic": "#ad7fa8",
    "router": "#4e9a06",
    "router, straight-through": "#8ae234",
    "oracle": "#3465a4",
}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of the seeds and half of its 95 % interval (Student's t; NaN for one seed)."""
    if len(values) < 2:
        return fmean(values), math.nan
    width = T_95[min(len(values), len(T_95)) - 1] * stdev(values) / math.sqrt(len(values))
    return fmean(values), width


def of_seeds(results: dict[str, Any], task: str, arm: str, what: str) -> list[list[float]]:
    """One list per budget with a value per seed; a baseline has one budget."""
    seeds = results["tasks"][task].values()
    return [
        [seed["arms"][arm][place][what] for seed in seeds]
        for place in range(len(next(iter(seeds))["arms"][arm]))
    ]


def is_text(task: str) -> bool:
    """Whether a task is measured by its loss."""
    return task == "byte text"


def _cell(values: list[float], digits: int = 3) -> str:
    mean, width = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(width) else f" ± {width:.{digits}f}")


def _values(results: dict[str, Any], task: str, arm: str) -> list[list[float]]:
    """Accuracy, or bits per byte for text."""
    if not is_text(task):
        return of_seeds(results, task, arm, "accuracy")
    losses = of_seeds(results, task, arm, "loss")
    return [[loss / math.log(2) for loss in row] for row in losses]


def markdown(results: dict[str, Any]) -> str:
    """All tables: mean over seeds, ± half of the 95 % interval; then every seed at 25 %."""
    fractions = results["fractions"]
    lines: list[str] = []
    for task, seeds in results["tasks"].items():
        what = "Bits per byte" if is_text(task) else "Share of right answers"
        lines += [f"### {task.capitalize()}", "", f"{what}, at the share of tokens stored.", ""]
        lines.append("| stored | " + " | ".join(f"{fraction:.0%}" for fraction in fractions) + " |")
        lines.append("|---" + "|--:" * len(fractions) + "|")
        arms = next(iter(seeds.values()))["arms"]
        for arm in arms:
            rows = _values(results, task, arm)
            cells = [_cell(row) for row in rows]
            if len(rows) == 1:  # a baseline, trained at one budget
                cells = [""] * (len(fractions) - 1) + cells
                if arm == "memory":
                    cells = cells[::-1]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        quarter = fractions.index(0.25)
        lines += ["", f"Every seed ({', '.join(seeds)}) at 25 %:", ""]
        for arm in arms:
            rows = _values(results, task, arm)
            row = rows[min(quarter, len(rows) - 1)]
            lines.append(f"- {arm}: " + ", ".join(f"{value:.3f}" for value in row))
        lines += ["", growth_line(results, task), ""]
        if has_trade_off(results, task):
            lines += [*trade_off_lines(results, task), ""]
    if results["options"]:
        lines += ["### Options of the layer", "", *option_lines(results)]
    return "\n".join(lines) + "\n"


def growth_line(results: dict[str, Any], task: str) -> str:
    """Stored of fresh over stored of repeated tokens, after two repetitions: the cache, and layers."""
    ratios: dict[str, list[float]] = {}
    for seed in results["tasks"][task].values():
        growth = seed.get("growth")
        if growth is None:
            return ""
        after = growth["tokens"].index(64)
        late = {
            name: [curve[-1] - curve[after] for curve in growth[name]]
            for name in ("fresh", "repeated")
        }
        for name, ratio in _ratios(late).items():
            ratios.setdefault(name, []).append(ratio)
    if len(ratios) == 2:  # the one layer is the cache
        del ratios["the cache"]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{ratio:.1f}" for ratio in row) for name, row in ratios.items()
    )
    return (
        "Surprise, at a threshold that a quarter of fresh tokens reach: stored of fresh tokens over "
        f"stored of 32 repeated ones, every seed: {told}."
    )


def _ratios(late: dict[str, list[float]]) -> dict[str, float]:
    """Fresh over repeated, of tokens stored per layer: in the cache as a whole, and by layer."""
    fresh, repeated = late["fresh"], late["repeated"]
    pairs = {"the cache": (sum(fresh), sum(repeated))}
    pairs |= {
        f"layer {layer}": pair for layer, pair in enumerate(zip(fresh, repeated, strict=True))
    }
    # one token in 16 sequences is the least that can be told from none
    return {name: one / max(other, 1 / 16) for name, (one, other) in pairs.items()}


def has_trade_off(results: dict[str, Any], task: str) -> bool:
    """Whether growth was measured at every budget, in some seed."""
    return any("budgets" in seed.get("growth", {}) for seed in results["tasks"][task].values())


class TradeOff(NamedTuple):
    """What a smaller budget costs, and how much slower the cache then grows on repeated input.

    Attributes:
        seeds: those in which growth was measured at every budget.
        cost: at every budget, per seed: what is lost against the same model at 25 %, in bits per
            byte or as a share of the answers.
        ratios: by name (the cache as a whole, then every layer), at every budget, per seed: tokens
            stored of fresh input over tokens stored of repeated input.
    """

    seeds: list[str]
    cost: list[list[float]]
    ratios: dict[str, list[list[float]]]


def trade_off(results: dict[str, Any], task: str) -> TradeOff:
    """The trade-off of a task, from the surprise arm and its growth."""
    all_seeds = results["tasks"][task]
    budgets = {
        seed: found["growth"]["budgets"]
        for seed, found in all_seeds.items()
        if "budgets" in found.get("growth", {})
    }
    places = [place for place, seed in enumerate(all_seeds) if seed in budgets]
    values = [[row[place] for place in places] for row in _values(results, task, "surprise")]
    quarter = values[results["fractions"].index(0.25)]
    sign = 1 if is_text(task) else -1  # more bits are a loss, and fewer answers
    cost = [[sign * (a - b) for a, b in zip(row, quarter, strict=True)] for row in values]
    found = [[_ratios(seed[place]) for seed in budgets.values()] for place in range(len(values))]
    ratios = {name: [[one[name] for one in row] for row in found] for name in found[0][0]}
    return TradeOff(list(budgets), cost, ratios)


def trade_off_lines(results: dict[str, Any], task: str) -> list[str]:
    """A table of the trade-off: one line per budget, then every seed at 25 %."""
    seeds, cost, ratios = trade_off(results, task)
    what = "bits per byte" if is_text(task) else "answers right"
    lines = [
        "Stored of fresh tokens over stored of 32 repeated ones, at thresholds that a share of "
        f"fresh tokens reaches, and what surprise loses at this budget against 25 % ({what}).",
        "",
        "| stored | lost against 25 % | " + " | ".join(ratios) + " |",
        "|---" + "|--:" * (1 + len(ratios)) + "|",
    ]
    for place, fraction in enumerate(results["fractions"]):
        cells = [_cell(cost[place]), *(_cell(rows[place], 1) for rows in ratios.values())]
        lines.append(f"| {fraction:.0%} | " + " | ".join(cells) + " |")
    quarter = ratios["the cache"][results["fractions"].index(0.25)]
    told = ", ".join(f"{ratio:.2f}" for ratio in quarter)
    return [*lines, "", f"The cache at 25 %, every seed ({', '.join(seeds)}): {told}."]


def option_lines(results: dict[str, Any]) -> list[str]:
    """A table of the options: everything stored, then surprise at 25 %."""
    lines = [
        "Recall. Steps of the curriculum and accuracy at its end with everything stored; then "
        "surprise at 25 %.",
        "",
        "| option | steps | everything | surprise, 25 % | every seed | values kept |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name, seeds in results["options"].items():
        made = [seed["checkpoint"] for seed in seeds.values()]
        found = [seed["measured"] for seed in seeds.values()]
        accuracy = [one["accuracy"] for one in found]
        lines.append(
            f"| {name} | {fmean(one['steps'] for one in made):.0f} "
            f"| {_cell([one['accuracy'] for one in made], 2)} | {_cell(accuracy)} "
            f"| {', '.join(f'{value:.3f}' for value in accuracy)} "
            f"| {_cell([one['kept_labelled'] for one in found], 2)} |"
        )
    return lines


def charts(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes one PNG per task: accuracy or bits per byte against the share of tokens stored.

    Lines are means over seeds, and small dots the seeds. A second one shows growth against what is
    lost, where it was measured at every budget.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    paths = []
    for task in results["tasks"]:
        figure, axes = plt.subplots(figsize=(6.4, 4.8), constrained_layout=True)
        _draw(axes, results, task)
        words = "-".join("".join(c if c.isalnum() else " " for c in task).split())
        paths.append(folder / f"routing-{words}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
        if has_trade_off(results, task):
            figure, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
            _draw_trade_off(axes, results, task)
            paths.append(folder / f"routing-{words}-growth.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def _draw_trade_off(axes: Any, results: dict[str, Any], task: str) -> None:
    """Growth against what the budget costs: means, and a small dot per seed.

    100 % is left out, where both inputs are stored.
    """
    _, cost, ratios = trade_off(results, task)
    places = [place for place, share in enumerate(results["fractions"]) if share < 1]
    x = [fmean(cost[place]) for place in places]
    colors = ("#cc4400", "#3465a4", "#4e9a06", "#75507b", "#888888")
    for number, (name, rows) in enumerate(ratios.items()):
        y, color = [fmean(rows[place]) for place in places], colors[number % len(colors)]
        axes.plot(x, y, "o-", color=color, markersize=4, label=name)
        for place in places:
            axes.plot(cost[place], rows[place], ".", color=color, alpha=0.35, markersize=5)
        if number == 0:
            for place, at, ratio in zip(places, x, y, strict=True):
                told = f"{results['fractions'][place]:.0%}"
                axes.annotate(told, (at, ratio), textcoords="offset points", xytext=(5, 5))
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set_yscale("log")
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    what = "bits per byte" if is_text(task) else "share of right answers"
    axes.set_xlabel(f"{what} lost against the same model at 25 %")
    axes.set_ylabel("stored of fresh / stored of repeated tokens")
    axes.set_title(f"{task.capitalize()}: growth at every budget", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw(axes: Any, results: dict[str, Any], task: str) -> None:
    arms = next(iter(results["tasks"][task].values()))["arms"]
    everything = _values(results, task, "everything")[0]
    for arm in arms:
        rows = _values(results, task, arm)
        if is_text(
            task
        ):  # seeds differ more than policies do, and a policy is compared in its seed
            rows = [[a - b for a, b in zip(row, everything, strict=True)] for row in rows]
        kept = of_seeds(results, task, arm, "keep_fraction")
        is_baseline, color = len(rows) == 1, COLORS.get(arm, "#555555")
        axes.plot(
            [fmean(row) for row in kept],
            [fmean(row) for row in rows],
            "s" if is_baseline else "o-",
            color=color,
            markersize=8 if is_baseline else 4,
            label=arm,
        )
        for share, row in zip(kept, rows, strict=True):
            axes.plot(share, row, ".", color=color, alpha=0.35, markersize=5)
    axes.set_xlabel("stored tokens / tokens")
    axes.set_ylabel(
        "bits per byte, above everything" if is_text(task) else "answers right, held out"
    )
    axes.set_title(task.capitalize(), loc="left")
    axes.set_xlim(-0.03, 1.03)
    if not is_text(task):
        axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.25)
    # below the axes, where it hides no seed
    axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
