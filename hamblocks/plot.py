"""Pictures of what layers stored. They need matplotlib: `pip install 'hamblocks[plot]'`.

    output = model(tokens)
    plot_kept(output.stats, text).savefig("kept.png")

Functions return a figure of matplotlib and show nothing by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hamblocks.extras import require
from hamblocks.fates import Fates, fates_of
from hamblocks.outputs import LayerStats
from hamblocks.protocols import check_count
from hamblocks_ops import NEVER
from hamblocks_ops.arguments import wrong

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stats = LayerStats | Iterable[LayerStats | None]
Color = tuple[float, float, float]

KEPT, STORED, EVICTED = (0.80, 0.30, 0.12), (0.36, 0.62, 0.83), (0.93, 0.93, 0.93)
"""Colors of a token that is stored for good, one that is stored at the end, and one that is not."""
PALE = (0.74, 0.827, 0.897)
"""Color of what was stored longest of what was evicted: a third of the way to blue."""
_SIGNS = {"\n": "↵", "\t": "→", "\r": "←"}
_POINTS, _ADVANCE = 9.0, 0.6021
"""Font size of text in points, and the width of a character in DejaVu Sans Mono over it."""


def plot_kept(
    stats: Stats, tokens: Sequence[str], *, sequence: int = 0, columns: int = 96
) -> Figure:
    """Draws a text and below each line what every layer and head stored of it.

    A token is red where it is stored for good, blue where it is still stored but will be evicted (a
    window, a top-k), pale blue where it was evicted, the bluer the longer it was stored, and gray
    where it was never stored. The text itself is darker, the more heads store the token for good. A
    line ends between two words, and behind a line break of the text.

    Args:
        stats: of a layer, or of all layers for the same tokens; layers without attention are left
            out.
        tokens: the T tokens of the sequence, as text.
        sequence: which batch row, or which sequence of a packed batch.
        columns: the most characters in a line; about 48 are legible on a phone.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no decisions to draw, or another number of tokens.
    """
    require("plot", "plot_kept", "matplotlib")
    from matplotlib.figure import Figure

    fates = _checked(_of_tokens(stats, sequence), tokens)
    columns = check_count("columns", columns, 8)
    lines = _lines(tokens, columns)
    colors = _colors(fates)
    share = fates.is_kept.float().mean(1)
    rows = len(fates.rows)
    strip = min(max(0.075 * rows, 0.09 * min(rows, 4), 0.11), 1.2)  # inches
    width = columns * _POINTS * _ADVANCE / 72
    named = _occurring(fates)
    length = sum(0.45 + 0.06 * len(name) for name in named)  # of the legend in one line, inches
    across = len(named) if length < width + 0.75 else 1
    line, top = strip + 0.28, 0.1 + 0.19 * (len(named) // across)
    figure = Figure(figsize=(width + 0.85, top + line * len(lines) + 0.1))
    height = figure.get_size_inches()[1]
    for number, cells in enumerate(lines):
        bottom = (height - top - line * (number + 1)) / height
        axes = figure.add_axes(
            (0.65 / (width + 0.85), bottom, width / (width + 0.85), strip / height)
        )
        image = torch.full((rows, columns, 3), 1.0)
        for column, (token, character) in enumerate(cells):
            image[:, column] = colors[token]
            axes.text(
                column + 0.5,
                1.06,
                character,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                family="monospace",
                fontsize=_POINTS,
                color=str(round(0.52 * (1 - float(share[token])), 3)),
                fontweight="bold" if float(share[token]) > 0.5 else "normal",
                clip_on=False,
            )
        axes.imshow(
            image.numpy(), aspect="auto", interpolation="nearest", extent=(0, columns, rows, 0)
        )
        _name_rows(axes, fates)
    _legend(figure, "upper left", named, across)
    return figure


def plot_scores(
    stats: Stats,
    tokens: Sequence[str] | None = None,
    *,
    sequence: int = 0,
    threshold: float | None = None,
) -> Figure:
    """Draws the score of every token, one panel per layer; what is stored for good has a dot.

    Args:
        stats: as in `plot_kept`.
        tokens: the T tokens as text, below the last panel; None: their positions. Best for up to
            about 150 tokens.
        sequence: which batch row, or which sequence of a packed batch.
        threshold: draws a line at this score.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no decisions to draw, or another number of tokens.
    """
    require("plot", "plot_scores", "matplotlib")
    from matplotlib.figure import Figure

    fates = _of_tokens(stats, sequence)
    if tokens is not None:
        _checked(fates, tokens)
    layers = list(dict.fromkeys(layer for layer, _ in fates.rows))
    places = fates.position
    figure = Figure(figsize=(11, 0.7 + 1.5 * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for layer, axes in zip(layers, panels, strict=True):
        for row, (of, head) in enumerate(fates.rows):
            if of != layer:
                continue
            score, kept = fates.score[:, row], fates.is_kept[:, row]
            (drawn,) = axes.plot(places, score, linewidth=0.9, label=f"head {head}")
            axes.plot(places[kept], score[kept], ".", markersize=5, color=drawn.get_color())
        if threshold is not None:
            axes.axhline(threshold, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"layer {layer}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    last = panels[-1]
    last.set_xlabel("position; a dot: stored for good")
    if tokens is not None:
        last.set_xticks(places, [printable(token) for token in tokens], fontsize=7)
        last.tick_params(axis="x", length=0)
        last.set_xlabel("a dot: stored for good")
    figure.suptitle("Score of every token", x=0.01, ha="left", fontsize=10)
    return figure


def plot_growth(stats: Mapping[str, Stats], *, sequence: int = 0) -> Figure:
    """Draws how many tokens a head stores after each token, mean and range over layers and heads.

    Args:
        stats: decisions by label, for example of fresh and of repeated text; each as in
            `plot_kept`.
        sequence: which batch row, or which sequence of a packed batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw.
    """
    require("plot", "plot_growth", "matplotlib")
    from matplotlib.figure import Figure

    if not isinstance(stats, Mapping) or not stats:
        raise wrong("stats", "decisions by label, such as {'fresh': output.stats}", stats)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    longest = 0
    for label, one in stats.items():
        stored = _of_tokens(one, sequence).stored_after()
        seen = torch.arange(1, len(stored) + 1)
        longest = max(longest, len(stored))
        (drawn,) = axes.plot(seen, stored.double().mean(1), label=label)
        lowest, highest = stored.amin(1), stored.amax(1)
        axes.fill_between(seen, lowest, highest, color=drawn.get_color(), alpha=0.18, linewidth=0)
    axes.plot([0, longest], [0, longest], color="0.6", linewidth=0.8, linestyle="--")
    axes.text(longest, longest, "everything ", ha="right", va="top", color="0.4", fontsize=8)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("tokens stored per head")
    axes.set_xlim(0, longest)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_lives(
    evict_at: Mapping[str, Tensor],
    *,
    score: Tensor | None = None,
    mark: int | None = None,
    reads: Mapping[str, Tensor] | None = None,
    columns: int = 3,
) -> Figure:
    """Draws the life of every token under several policies, one panel for each.

    Tokens stand from top to bottom, time runs to the right. The life of token j is a bar in row j,
    from its own position to `evict_at[j]`. It is red if the token is stored for good, and blue if
    it is evicted later. Where the bar has ended, and where a token is never stored, the row is
    gray. A column of a panel is therefore what one query may read.

    Args:
        evict_at: lifetimes by label, integers `[T]` each, such as
            `{"window": Window(8)(score).evict_at[0, :, 0]}` or `stats.evict_at[0, :, 0]`. The
            tokens have the positions 0 to T - 1.
        score: what the policies decided from, `[T]`; drawn in a panel of its own, row by row.
        mark: outlines the life of this token in every panel and says when it ends.
        reads: by label, the queries that a query gate lets read, bool `[T]`; the columns of others
            are pale. A label without an entry has no query gate.
        columns: panels side by side.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw, a tensor of another shape or dtype, or no such token.
    """
    require("plot", "plot_lives", "matplotlib")
    from matplotlib.figure import Figure

    lives = _checked_lives(evict_at)
    tokens = len(next(iter(lives.values())))
    if score is not None and (not isinstance(score, Tensor) or score.shape != (tokens,)):
        raise wrong("score", f"a tensor [{tokens}], as evict_at has tokens", score)
    if mark is not None and check_count("mark", mark) >= tokens:
        raise wrong("mark", f"a token in [0, {tokens})", str(mark))
    reading = _checked_reads(reads or {}, lives)
    panels = len(lives) + (score is not None)
    columns = min(check_count("columns", columns, 1), panels)
    rows = -(-panels // columns)
    names = ("stored for good", "stored until it is evicted", "evicted or never stored")
    lines = -(-len(names) // columns)  # of the legend
    size = 1.8 * columns + 0.3, 1.95 * rows + 0.3 + 0.2 * lines
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    used, unused = list(grid.flat[:panels]), list(grid.flat[panels:])
    for axes in unused:
        axes.set_axis_off()
    for axes in used:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    if score is not None:
        _draw_scores(used[0], score, mark)
    for (label, life), axes in zip(lives.items(), used[panels - len(lives) :], strict=True):
        axes.imshow(_bars(life, reading.get(label)).numpy(), aspect="auto", interpolation="nearest")
        axes.set_title(label, fontsize=9, loc="left")
        if mark is not None:
            _outline(axes, mark, int(life[mark]), tokens)
    for axes in grid[:, 0]:
        axes.set_ylabel("token", fontsize=8)
    for axes in used[-columns:]:
        axes.set_xlabel("position of the query", fontsize=8)
    named = dict(zip(names, (KEPT, STORED, EVICTED), strict=True))
    _legend(figure, "outside upper left", named, min(columns, 3))
    return figure


def printable(token: str) -> str:
    """A token in characters of one column each; at least one."""
    shown = "".join(_SIGNS.get(one, one if one.isprintable() else "·") for one in token)
    return shown or "·"


def _of_tokens(stats: Stats, sequence: int) -> Fates:
    """The decisions about one sequence, of at least one token."""
    fates = fates_of(stats, sequence)
    if not len(fates.position):
        raise wrong("sequence", "one with a token", f"{sequence}, which is empty")
    return fates


def _checked(fates: Fates, tokens: Sequence[str]) -> Fates:
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise wrong("tokens", "a list of texts, one for each token", tokens)
    if len(tokens) != len(fates.position):
        raise wrong("tokens", f"{len(fates.position)} tokens, as stats", str(len(tokens)))
    return fates


def _checked_lives(evict_at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lifetimes as int64 on the CPU."""
    if not isinstance(evict_at, Mapping) or not evict_at:
        raise wrong(
            "evict_at", "lifetimes by label, such as {'window': evict_at[0, :, 0]}", evict_at
        )
    lives = {}
    for label, life in evict_at.items():
        if not isinstance(life, Tensor) or life.dtype.is_floating_point or life.dim() != 1:
            raise wrong(f"evict_at[{label!r}]", "integers [T], of one head of a sequence", life)
        lives[label] = life.detach().long().cpu()
    tokens = {len(life) for life in lives.values()}
    if len(tokens) > 1 or tokens == {0}:
        raise wrong("evict_at", "as many tokens under every label, at least one", str(tokens))
    return lives


def _checked_reads(reads: Mapping[str, Tensor], lives: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which queries read, on the CPU."""
    for label, queries in reads.items():
        if label not in lives:
            raise wrong("reads", f"labels of evict_at ({', '.join(lives)})", repr(label))
        if not isinstance(queries, Tensor) or queries.dtype != torch.bool:
            raise wrong(f"reads[{label!r}]", "bool [T]", queries)
        if queries.shape != lives[label].shape:
            raise wrong(f"reads[{label!r}]", f"bool {list(lives[label].shape)}", queries)
    return {label: queries.detach().cpu() for label, queries in reads.items()}


def _bars(life: Tensor, reads: Tensor | None) -> Tensor:
    """What every query may read, as colors: float32 `[T tokens, T queries, 3]`."""
    born = torch.arange(len(life))[:, None]
    query = born.T
    kept, stored, gone = (torch.tensor(color) for color in (KEPT, STORED, EVICTED))
    alive = (life == NEVER)[:, None, None]
    bars = torch.where((query < life[:, None])[..., None], torch.where(alive, kept, stored), gone)
    if reads is not None:
        bars = torch.where(reads[None, :, None], bars, 0.25 * bars + 0.75)
    return torch.where((query < born)[..., None], 1.0, bars)


def _draw_scores(axes: Any, score: Tensor, mark: int | None) -> None:
    drawn = axes.barh(range(len(score)), score.tolist(), height=0.8, color="0.6")
    axes.set_title("score", fontsize=9, loc="left")
    if mark is not None:
        drawn[mark].set_color("black")


def _outline(axes: Any, token: int, end: int, tokens: int) -> None:
    """Outlines a token's life, and says when it ends where no life is drawn: in the lower left."""
    from matplotlib.patches import Rectangle

    width = min(end, tokens) - token
    if width > 0:
        corner = (token - 0.5, token - 0.5)
        axes.add_patch(Rectangle(corner, width, 1, fill=False, color="black", linewidth=0.8))
    says = "for good" if end == NEVER else f"until {end}" if end > token else "not stored"
    place = {"transform": axes.transAxes, "va": "bottom", "fontsize": 8}
    axes.text(0.03, 0.03, f"token {token}:\n{says}", **place)


def _lines(tokens: Sequence[str], columns: int) -> list[list[tuple[int, str]]]:
    """(token, character) of every cell, line by line; a word that fits in a line is not cut."""
    words: list[list[tuple[int, str]]] = [[]]
    ends = {0}  # words that begin a line
    for index, token in enumerate(tokens):
        if token[:1].isspace() and token[0] != "\n":
            words.append([])
        words[-1] += [(index, character) for character in printable(token)]
        if token.endswith("\n"):
            ends.add(len(words))
            words.append([])
    lines: list[list[tuple[int, str]]] = []
    for number, word in enumerate(words):
        if number in ends or len(lines[-1]) + len(word) > columns:
            lines.append([])
        for cell in word:
            if len(lines[-1]) == columns:
                lines.append([])
            lines[-1].append(cell)
    return [line for line in lines if line]


def _colors(fates: Fates) -> Tensor:
    """Color of every token and row, float32 `[T, rows, 3]`."""
    kept, stored, gone = (torch.tensor(color) for color in (KEPT, STORED, EVICTED))
    life = (fates.evict_at - fates.position[:, None]).clamp(min=0).float()
    ended = life.masked_fill(fates.is_stored, 0)
    # the longest life that has ended is a third as blue as one that goes on, as PALE is
    pale = torch.where(ended > 0, (0.4 + 0.6 * ended / ended.amax().clamp(min=1)) / 3, 0.0)
    blue = torch.where(fates.is_stored, 1.0, pale)[..., None]
    colors = gone + blue * (stored - gone)
    return torch.where(fates.is_kept[..., None], kept, colors)


def _name_rows(axes: Any, fates: Fates) -> None:
    """Names the first row of every layer, where there is room."""
    heads = Counter(layer for layer, _ in fates.rows)
    borders = list(accumulate(heads.values(), initial=0))
    middles = [(begin + end) / 2 for begin, end in pairwise(borders)]
    step = -(-len(heads) // 6)
    names = [f"layer {layer}" for layer in heads]
    axes.set_yticks(middles[::step], names[::step], fontsize=6.5)
    axes.tick_params(length=0, pad=2)
    axes.set_xticks([])
    if len(heads) <= 12:
        for border in borders[1:-1]:
            axes.axhline(border, color="white", linewidth=0.6)
    axes.spines[:].set_visible(False)


def _occurring(fates: Fates) -> dict[str, Color]:
    """The fates that some token has, with their colors."""
    kept, stored = fates.is_kept, fates.is_stored
    lived = fates.evict_at > fates.position[:, None]
    occurs = (
        ("stored for good", KEPT, kept),
        ("still stored", STORED, stored & ~kept),
        ("evicted", PALE, lived & ~stored),
        ("never stored", EVICTED, ~lived),
    )
    return {name: color for name, color, where in occurs if bool(where.any())}


def _legend(
    figure: Figure,
    place: Literal["upper left", "outside upper left"],
    named: Mapping[str, Color],
    columns: int,
) -> None:
    """Names colors, in so many columns."""
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=name) for name, color in named.items()]
    figure.legend(handles=patches, loc=place, ncols=columns, frameon=False, fontsize=8)
