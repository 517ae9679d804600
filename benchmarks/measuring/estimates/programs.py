"""How programs of compiled kernels share the multiprocessors of a chip."""

from __future__ import annotations

import functools
import heapq
from pathlib import Path
from typing import Any

from measuring.chips import Chip
from measuring.visits import Visits

DOCS = Path(__file__).parents[3] / "docs" / "kernels.md"
"""The table of compiled kernels; `tests/kernels/test_machine_code.py` holds it to the compiler."""


@functools.cache
def compiled(architecture: str) -> dict[tuple[str, str], dict[str, str]]:
    """The table of compiled kernels of one architecture, by kernel and head size."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| kernel | head size |"))
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start:]
        if line.startswith("|")
    ]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return {(row["kernel"], row["head size"]): row for row in rows if row["chip"] == architecture}


def blocks_at_once(chip: Chip, name: str, width: int, config: Any) -> int:
    """Programs of a kernel of attention that a multiprocessor holds, of a launch (`sizes.Config`).

    A launch that the table does not list, as the sweep tries them, holds the registers that it may
    have: one block of 8 warps, or two of 4.
    """
    row = compiled(chip.compiled).get((name, str(width)))
    tile = f"{config.queries} x {config.keys}"
    if row and (row["tile"], row["warps"]) == (tile, str(config.warps)):
        return int(row["blocks"])
    return max(1, 8 // int(config.warps))


def makespan(durations: list[float], places: int) -> float:
    """When the last program ends, if each begins in its turn as soon as a place is free."""
    ends = [0.0] * min(places, max(1, len(durations)))
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def busy(
    chip: Chip, visited: Visits, blocks: int, tile: float, masked: float, before: float
) -> tuple[float, float]:
    """Seconds that the multiprocessors are busy on average, and until the last program ends.

    Args:
        chip: the GPU.
        visited: tiles of every program.
        blocks: programs that a multiprocessor holds; they share its tensor cores.
        tile: seconds of a tile without a mask if it has a multiprocessor alone.
        masked: times as long takes a tile with a mask.
        before: seconds of a program beside its tiles.
    """
    units = visited.whole + masked * visited.masked
    durations = (units * tile * blocks + before).tolist()
    places = blocks * chip.multiprocessors
    return sum(durations) / places, makespan(durations, places)
