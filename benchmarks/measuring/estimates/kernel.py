"""The estimate of a kernel, and of a phase of several."""

from __future__ import annotations

from typing import Any, NamedTuple

from measuring.chips import Chip
from measuring.floors import Work

ANY_OP = 2
"""Accesses of the simplest kernel that depend on each other: it loads, and what it stores arrives."""
UNEVEN = 1.25
"""How much later than the average place the last one ends, where programs are called uneven."""


class Estimate(NamedTuple):
    """What a kernel, or a phase of several, should take.

    Attributes:
        name: of the kernel or phase.
        launches: kernels.
        bytes: read and written in memory.
        operations: of tensor cores, in the tiles that run.
        waves: programs for each that the chip holds at once; None where it says nothing.
        seconds: the estimate.
        bound: what takes the most of it.
        floor: the least time at the rates of the same chip, in seconds.
        parts: the kernels of a phase.
    """

    name: str
    launches: int
    bytes: float
    operations: float
    waves: float | None
    seconds: float
    bound: str
    floor: float
    parts: tuple[Estimate, ...] = ()

    def record(self) -> dict[str, Any]:
        """As it is written to the JSON file."""
        parts = {part.name: part.seconds for part in self.parts}
        return {"estimate": self.seconds, "estimate_bound": self.bound, "estimate_parts": parts}


def kernel(
    name: str,
    chip: Chip,
    *,
    launches: int = 1,
    moved: float = 0,
    l2: float = 0,
    operations: float = 0,
    tensor_cores: float = 0,
    last: float = 0,
    accesses: float = ANY_OP,
    waves: float | None = None,
    work: Work | None = None,
    graphed: bool = False,
) -> Estimate:
    """The estimate of one kernel, or of several that are alike.

    Args:
        name: of the kernel.
        chip: the GPU.
        launches: how many there are, one behind the other.
        moved: bytes of all of them, read and written in memory.
        l2: bytes of all of them, read from the L2 cache.
        operations: of tensor cores.
        tensor_cores: seconds that the multiprocessors are busy with them, on average.
        last: seconds until the last program ends.
        accesses: of each, that depend on each other.
        waves: see `Estimate`.
        work: the least that has to be done; None: what is moved.
        graphed: whether a CUDA graph launches them.
    """
    bounds = {
        "tensor cores": tensor_cores,
        "uneven programs": last if last > UNEVEN * tensor_cores else 0.0,
        "L2": l2 / chip.l2_bytes_per_second,
        "memory": moved / chip.ceilings.bytes_per_second,
        "latency": launches * accesses * chip.access,
    }
    launching = launches * (chip.node if graphed else chip.launch)
    longest = max(bounds, key=lambda bound: bounds[bound])
    works = max(bounds[longest], last)
    return Estimate(
        name,
        launches,
        moved,
        operations,
        waves,
        launching + works,
        longest if works > launching else "launches",
        (Work(0, moved) if work is None else work).floor(chip.ceilings),
    )


def together(name: str, parts: list[Estimate], floor: float) -> Estimate:
    """A phase: its kernels run one behind the other."""
    share: dict[str, float] = {}
    for part in parts:
        share[part.bound] = share.get(part.bound, 0.0) + part.seconds
    return Estimate(
        name,
        sum(part.launches for part in parts),
        sum(part.bytes for part in parts),
        sum(part.operations for part in parts),
        None,
        sum(part.seconds for part in parts),
        max(share, key=lambda bound: share[bound]),
        floor,
        tuple(parts),
    )
