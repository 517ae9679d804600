"""Shows what was measured: a table, two of them in Markdown, and a chart."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from rich.table import Table

from hamblocks.experiments.evaluation.documents import KEY_VALUE, PASSKEY
from hamblocks.experiments.evaluation.measure import Measured
from hamblocks.experiments.evaluation.policies import Policy
from hamblocks.experiments.evaluation.study import Results, Row
from hamblocks.experiments.routing_report import interval

TITLES = (
    "policy",
    "asked",
    "stored",
    "nats per token",
    "against random",
    "passkeys",
    "keys and values",
    "bytes per token",
    "allocated",
    "tokens per second",
    "decoded per second",
)
KEYS = 2
"""Columns that tell the rows apart."""
QUALITY = 7
"""The columns before the costs. A phone shows these, or the costs, without scrolling."""

CONTROL = "random"
"""The policy that others are compared with, at the same fraction."""


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval (NaN with one value)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.half) else f" ± {self.half:.3f}")


def against_control(results: Results, policy: str, fraction: float | None) -> Interval | None:
    """Nats per token less than the control's, seed by seed on the same documents: below 0 is ahead.

    None for the control itself, for a policy without a fraction, and where the control is missing.
    """
    if policy == CONTROL or fraction is None:
        return None
    differences = []
    for row in results.seeds_of(policy, fraction):
        control = results.find(CONTROL, fraction, row.seed)
        if control is not None:
            differences.append(row.measured.nll - control.measured.nll)
    return Interval(*interval(differences)) if differences else None


def _groups(results: Results) -> list[tuple[Policy, float | None, list[Row]]]:
    """The rows of every policy and fraction, in the order of the plan."""
    found = []
    for policy in results.plan.policies:
        for fraction in (None,) if policy.fixed else results.plan.fractions:
            rows = results.seeds_of(policy.name, fraction)
            if rows:
                found.append((policy, fraction, rows))
    return found


def _mean(rows: list[Row], of: Callable[[Measured], float]) -> float:
    return fmean(of(row.measured) for row in rows)


def _recall(rows: list[Row], kind: str) -> str:
    answers = [a for row in rows for a in row.measured.answers if a.kind == kind]
    return f"{sum(a.found for a in answers)}/{len(answers)}" if answers else ""


def _table_rows(results: Results) -> list[list[str]]:
    tokens = results.plan.count * results.plan.length
    rows = []
    for policy, fraction, group in _groups(results):
        ahead = against_control(results, policy.name, fraction)
        rows.append(
            [
                policy.name,
                "" if fraction is None else f"{fraction:.0%}",
                f"{_mean(group, lambda m: m.stored):.1%}",
                f"{_mean(group, lambda m: m.nll):.3f}",
                "" if ahead is None else str(ahead),
                _recall(group, PASSKEY),
                _recall(group, KEY_VALUE),
                f"{_mean(group, lambda m: m.bytes_in_use) / tokens:,.0f}",
                f"{_mean(group, lambda m: m.bytes_allocated) / tokens:,.0f}",
                f"{_mean(group, lambda m: m.prefill_tokens_per_second):,.0f}",
                f"{_mean(group, lambda m: m.decode_tokens_per_second):,.0f}",
            ]
        )
    return rows


def caption(results: Results) -> str:
    """What was run, in one line."""
    plan, about = results.plan, results.about
    return (
        f"{about['model']}, {about['parameters']:,} parameters, {about['dtype']}; "
        f"{len(plan.seeds)} x {plan.count} documents of {plan.length} tokens; window {plan.window} "
        f"and {plan.sinks} sinks under every policy; seeds {', '.join(map(str, plan.seeds))}"
    )


def table(results: Results) -> Table:
    """A table for the terminal."""
    view = Table(title=caption(results))
    for place, title in enumerate(TITLES):
        view.add_column(title, justify="right" if place else "left")
    for row in _table_rows(results):
        view.add_row(*row)
    return view


def markdown(results: Results) -> str:
    """The same in Markdown, as two tables: what is kept of the model, and what it costs."""
    rows = [list(TITLES), *_table_rows(results)]
    quality = [row[:QUALITY] for row in rows]
    costs = [row[:KEYS] + row[QUALITY:] for row in rows]
    lines = [caption(results) + "."]
    for titles, *cells in (quality, costs):
        lines += ["", f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n"


def chart(results: Results, path: Path) -> None:
    """Writes a PNG: loss, passkeys and lines with keys and values against bytes in use.

    Bars reach from the best seed to the worst.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    # below each other: a phone shows them legibly
    figure, axes = plt.subplots(3, 1, figsize=(5.6, 8.6), sharex=True, constrained_layout=True)
    curves = [(policy, _points(results, policy)) for policy in results.plan.policies]
    curves = [(policy, points) for policy, points in curves if points]
    colors = plt.get_cmap("tab20")
    everything = {p.name for p in results.plan.policies if p.store == "everything"}
    whole = {row.seed: row.measured.nll for row in results.rows if row.policy in everything}

    def lost(row: Row) -> float:
        # against everything on the same documents: texts differ more than policies
        return row.measured.nll - whole.get(row.seed, 0.0)

    plots = (
        ("Loss on held-out text", f"nats per token{' lost' if whole else ''}", lost),
        ("Passkeys recalled", "fraction", lambda row: row.measured.recall(PASSKEY)),
        ("Keys and values recalled", "fraction", lambda row: row.measured.recall(KEY_VALUE)),
    )
    for ax, (title, label, of) in zip(axes, plots, strict=True):
        for place, (policy, points) in enumerate(curves):
            color = "#222222" if policy.store == "everything" else colors(place % 20)
            _draw(ax, policy, points, of, color, "osv^D*"[place % 6])
        ax.set_title(title, loc="left")
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
        ax.set_xlim(left=0)
    axes[-1].set_xlabel("bytes in use, of those of everything")
    for ax in axes[1:]:
        ax.set_ylim(-0.04, 1.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    figure.suptitle(
        textwrap.fill(caption(results), 90), x=0.01, ha="left", fontsize=8.5, color="#555555"
    )
    figure.savefig(path, dpi=180)
    plt.close(figure)


def _points(results: Results, policy: Policy) -> list[tuple[float, list[Row]]]:
    """Bytes over those of everything (over the largest, if everything was not measured), and rows."""
    groups = _groups(results)
    whole = [rows for other, _, rows in groups if other.store == "everything"]
    most = max(_mean(rows, lambda m: m.bytes_in_use) for rows in whole or [r for *_, r in groups])
    own = [rows for other, _, rows in groups if other.name == policy.name]
    return sorted(
        ((_mean(rows, lambda m: m.bytes_in_use) / most, rows) for rows in own),
        key=lambda point: point[0],
    )


def _draw(
    axes: Any,
    policy: Policy,
    points: list[tuple[float, list[Row]]],
    of: Callable[[Row], float],
    color: Any,
    marker: str,
) -> None:
    columns = [[of(row) for row in rows] for _, rows in points]
    middle = [fmean(column) for column in columns]
    axes.errorbar(
        [x for x, _ in points],
        middle,
        yerr=[
            [m - min(column) for m, column in zip(middle, columns, strict=True)],
            [max(column) - m for m, column in zip(middle, columns, strict=True)],
        ],
        fmt=f"{marker}-",
        color=color,
        capsize=2,
        markersize=5,
        linewidth=1.2,
        elinewidth=0.7,
        alpha=0.9,
        label=policy.name,
    )
