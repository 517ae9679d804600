"""Shows the results: a table and a chart."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from rich.table import Table

from hamblocks.experiments.text import Results, Run


def table(results: Results) -> Table:
    """A table of the models, and of the trained HAM at every keep fraction."""
    view = Table(
        title=f"Held-out {results.source}: {results.parameters:,} parameters each, "
        f"{results.settings.steps} steps"
    )
    view.add_column("model")
    for column in ("bits per\nbyte", "keep\nfraction", "cache bytes\nper token", "training"):
        view.add_column(column, justify="right")
    for row in results.models:
        view.add_row(*_cells(row))
    view.add_section()
    for row in results.trade_off:
        view.add_row(*_cells(row))
    return view


def markdown(results: Results) -> str:
    """The same table in Markdown."""
    lines = [
        "| model | bits per byte | keep fraction | cache bytes per token | training |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        "| " + " | ".join(_cells(row)) + " |" for row in [*results.models, *results.trade_off]
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Run) -> list[str]:
    return [
        row.name,
        f"{row.bits_per_byte:.3f}",
        f"{row.keep_fraction:.3f}",
        f"{row.cache_bytes_per_token:,.0f}",
        f"{row.seconds:.0f} s" if row.seconds else "",
    ]


def chart(results: Results, path: Path) -> None:
    """Writes a PNG with two plots: loss against keep fraction, and growth of the cache."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    curve = sorted(results.trade_off, key=lambda row: row.keep_fraction)
    left.plot(
        [row.keep_fraction for row in curve],
        [row.bits_per_byte for row in curve],
        "o-",
        color="#3465a4",
        label="the trained HAM, threshold moved",
    )
    for row, marker, color in zip(
        results.models, "vs*X", ("#888888", "#222222", "#cc4400", "#75507b"), strict=True
    ):
        left.plot(
            row.keep_fraction,
            row.bits_per_byte,
            marker,
            color=color,
            markersize=11,
            label=row.name,
            zorder=3,
        )
    left.set_xlabel("keep fraction (stored tokens / tokens)")
    left.set_ylabel("bits per byte, held out")
    left.set_title("What storing tokens buys", loc="left")
    left.set_xlim(-0.03, 1.03)
    left.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=8.5)
    for growth, color in zip(results.growth, ("#cc4400", "#3465a4"), strict=True):
        right.plot(growth.tokens, growth.stored, color=color, label=growth.name)
    longest = results.growth[0].tokens[-1]
    right.plot(
        [0, longest],
        [0, longest * results.settings.target],
        ":",
        color="#888888",
        label="the target",
    )
    right.set_xlabel("tokens seen")
    right.set_ylabel("tokens stored (mean of layers and heads)")
    right.set_title("How the cache grows", loc="left")
    right.set_xlim(0, longest)
    right.set_ylim(0)
    right.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=8.5)
    figure.suptitle(
        f"{results.parameters:,} parameters, {results.settings.steps} steps, {results.source}; "
        f"{results.device}",
        x=0.01,
        ha="left",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
