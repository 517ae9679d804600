"""One decoded token."""

from __future__ import annotations

import functools
import math

from measuring.chips import Chip
from measuring.estimates.kernel import ANY_OP, Estimate, kernel, together
from measuring.estimates.programs import compiled
from measuring.floors import Work

HOST_OP, HOST_KERNEL = 6e-6, 30e-6
"""Seconds of the host for an op of torch and for a kernel of ours in eager mode. Assumptions:
Triton's launch alone takes 9 to 11 us (vllm#34838, tritonbench#1002), and the operator, the checks and
the views around it twice that."""
OUR_DECODE_KERNELS = 11
"""Kernels of ours among the launches of a decoded token, with one slab of pages."""
DECODE_LAUNCHES = {"Threshold": 27, "Threshold | Window": 30, "TopK": 25}
"""Launches of a decoded token with one slab of pages (docs/kernels.md)."""
RANDOM_GATE = 38
"""Launches more that `RandomGate` takes, by which `benchmarks/gpu.py` stores a fraction
(tests/kernels/test_decode_launches.py)."""
PAGE = 32
"""Tokens of a page of a layer's cache."""
SCANNED = 1024
"""Slots, or pages, that a program of `append` looks at together."""


def slabs_of(pieces: int, pages: int) -> list[int]:
    """Pages of every slab of a pool that takes this many pages a piece, as `Pool.ensure` grows."""
    slabs: list[int] = []
    for piece in range(1, pieces + 1):
        missing = piece * pages - sum(slabs)
        if missing > 0:
            slabs.append(max(missing, sum(slabs) // 2))
    return slabs


def decode(
    chip: Chip,
    stored: float,
    sequences: int,
    hidden: int,
    heads: int,
    dim: int,
    *,
    item: int = 2,
    graphed: bool,
    slabs: tuple[float, ...] = (1.0,),
    launches: int = DECODE_LAUNCHES["Threshold"],
) -> Estimate:
    """One token of every sequence through a layer, with its pages reserved.

    Args:
        chip: the GPU.
        stored: tokens of a sequence and head in the cache.
        sequences: N.
        hidden: hidden size.
        heads: heads of memory and attention.
        dim: head size.
        item: bytes of an entry.
        graphed: replayed from a CUDA graph; else the host launches one kernel after another.
        slabs: the parts of the stored tokens in each slab.
        launches: of a token with one slab.
    """
    streams, weights = sequences * heads, item * (4 * hidden * heads * dim + 4 * heads * hidden)
    cache, state = 2.0 * item * stored * streams * dim, 4.0 * streams * dim * dim
    # the page table, and positions and lifetimes of all slots
    listing = streams * stored * (8 + 4 / PAGE)
    one = functools.partial(kernel, graphed=graphed)
    parts = [
        one("projections", chip, launches=7, moved=float(weights)),
        one("parts", chip, launches=4, moved=0.0),
        one("delta rule", chip, moved=2 * state, accesses=ANY_OP),
    ]
    compiled_rows = compiled(chip.compiled)
    width = max(64, 1 << (dim - 1).bit_length())
    blocks = int(compiled_rows["share of pages", str(width)]["blocks"])
    # shares of a stream: two programs for each multiprocessor
    shares = max(1, math.ceil(2 * chip.multiprocessors / streams))
    tiles = math.ceil(stored / 64 / shares)
    for number, part in enumerate(slabs):
        # each launch walks the whole table, and reads the keys and values of its slab
        reads = min(tiles, math.ceil(part * stored / 64))
        parts.append(
            one(
                f"read of slab {number}" if len(slabs) > 1 else "read of stored tokens",
                chip,
                moved=part * (cache + listing),
                accesses=ANY_OP + tiles + 2 * reads,
                waves=streams * shares / (blocks * chip.multiprocessors),
                work=Work(0, part * cache),
            )
        )
    merged = 4.0 * shares * len(slabs) * streams * (dim + 1)
    parts += [
        one("read of the new token", chip, accesses=ANY_OP + 3),
        one("merge", chip, moved=merged, accesses=ANY_OP + shares * len(slabs)),
        one(
            "plan of the new token",
            chip,
            moved=listing / 2,
            accesses=ANY_OP + 2 * math.ceil(stored / SCANNED),
        ),
        one("find and append", chip, launches=1 + len(slabs), accesses=ANY_OP + 3),
    ]
    rest = launches - sum(x.launches for x in parts) + 2 * (len(slabs) - 1)
    parts.append(one("ops of torch", chip, launches=rest))
    # the cache is read, and the weights and the state pass through memory in any case
    floor = Work(0, cache + weights + 2 * state).floor(chip.ceilings)
    found = together("one token", parts, floor)
    kernels = OUR_DECODE_KERNELS + 2 * (len(slabs) - 1)
    host = kernels * HOST_KERNEL + (found.launches - kernels) * HOST_OP
    if graphed or host <= found.seconds:
        return found
    return found._replace(seconds=host, bound="host")


def read_of_cache(chip: Chip, nbytes: int) -> Estimate:
    """Attention of one token to a dense cache: two launches that read it once."""
    return kernel("a dense cache", chip, launches=2, moved=float(nbytes))
