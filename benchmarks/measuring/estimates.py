"""Estimates: what a computation should take on a GPU, from counts and published rates.

No kernel of hamblocks was timed for them. A kernel takes

    launches * launch + max(tensor cores, last program, L2, memory, latency)

- tensor cores: every program takes the tiles that it really visits (`visits.py`), those with a mask
  MASKED_TILE times as long, behind four accesses to memory that depend on each other. Programs run
  in the order of their launch on the multiprocessors, as many at once as the table of compiled
  kernels says (docs/kernels.md). Where the last ends much later than the average multiprocessor is
  busy, the bound is called "uneven programs".
- L2: bytes that tiles read from the cache. memory: bytes read and written once.
- latency: accesses to memory that wait for each other, as in a program that walks a list.

A phase is a sum of kernels, which run one behind the other. `bound` names what takes the most of it.
A floor (`floors.py`) stands beside each estimate, at the rates of the same chip. `benchmarks/gpu.py`
writes estimates beside measured times: a ratio far from 1 shows which assumption is wrong.

Letters: C tokens in a chunk, D head size, T tokens.
"""

from __future__ import annotations

import functools
import heapq
import math
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from measuring import chips, floors
from measuring.chips import Chip
from measuring.floors import CHUNK, Work
from measuring.targets import DENSE
from measuring.visits import Configs, Visits, seen, visits

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
"""The table of compiled kernels; `tests/kernels/test_machine_code.py` holds it to the compiler."""
TUNED = "hamblocks_ops.selected_attention.triton.sizes"
"""The module of launches. It needs Triton, so it is imported where an estimate is made."""
PRODUCTS = {"forward": 2, "queries_grad": 3, "keys_grad": 4}
"""Products of a tile. The backward kernels compute q k^T and the gradient of the weights twice."""
BEFORE_TILES = 4
"""Accesses that depend on each other before a program's first tile: plan, range, list, keys."""
ANY_OP = 2
"""Accesses of the simplest kernel that depend on each other: it loads, and what it stores arrives."""
ELEMENTWISE = {"forward": (84, 206), "backward": (193, 535)}
"""The ops of torch in a layer beside the products of its projections, the delta rule and attention:
their number, and what they read and write in units of a bfloat16 tensor [T, heads * D]. A test counts
them."""
FUSED = 0.15
"""Part of these bytes and launches that is left in a compiled layer. Assumption."""
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
UNEVEN = 1.25
"""How much later than the average place the last one ends, where programs are called uneven."""
PAGE = 32
"""Tokens of a page of a layer's cache."""
SCANNED = 1024
"""Slots, or pages, that a program of `append` looks at together."""


counted = functools.lru_cache(maxsize=32)(visits)
"""The visits of the same lifetimes serve several estimates. Lifetimes are never changed in place."""


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


def attention(
    chip: Chip,
    evict_at: Tensor,
    heads: int,
    dim: int,
    *,
    item: int = 2,
    learns: bool,
    until: Tensor | None = None,
    configs: Configs | None = None,
) -> Estimate:
    """selected_attention(impl="triton"), forward and, with `learns`, backward.

    Args:
        chip: the GPU.
        evict_at: int32 `[1, T, Hkv]`, counted over the whole batch row.
        heads: query heads.
        dim: head size.
        item: bytes of an entry of q, k and v.
        learns: whether there is a backward pass.
        until: the end of the sequence of each token, as in `visits`; packed where it is given.
        configs: launches; None: those of the chip.
    """
    _, tokens, kv_heads = evict_at.shape
    group, width = heads // kv_heads, max(64, 1 << (dim - 1).bit_length())
    if configs is None:
        chosen = import_module(TUNED).configs
        configs = chosen(width, torch.bfloat16, chip.major, loaded=group > 1)
    pairs, kept = seen(evict_at)
    visited = counted(evict_at, configs, group=group, keep=learns, until=until)
    parts = lists(chip, tokens, kv_heads, dim, item, kept, configs, learns, until is not None)
    th, own = tokens * heads, tokens * kv_heads
    # what each kernel reads and writes once: forward q, out, lse and out in float32; the lists
    kv = 2 * kept * dim * item + 8 * own
    moved = {
        "forward": (2 * item + 4 * learns) * th * dim + 4 * th + kv,
        "queries_grad": (3 * item + 4) * th * dim + 8 * th + kv,
        "keys_grad": 2 * item * (th + own) * dim + 8 * th + kv,
    }
    suffix = " with bias, grouped" if group > 1 else ""
    for (name, products), config, own_visits in zip(
        PRODUCTS.items(), configs, visited, strict=False
    ):
        blocks = blocks_at_once(chip, name + suffix, width, config)
        rate = chips.TRITON if name == "forward" else chips.TRITON_BACKWARD
        operations = 2 * products * config.queries * config.keys * width
        each = chip.operations_per_second / chip.multiprocessors * rate
        # the kernel of keys takes masks in the same pipeline
        masked = 1.0 if name == "keys_grad" else chips.MASKED_TILE
        before = BEFORE_TILES * chip.access
        mean, last = busy(chip, own_visits, blocks, operations / each, masked, before)
        # a tile reads two tensors of the other side
        read = config.queries if name == "keys_grad" else config.keys
        # out in float32 is for the backward pass alone
        extra = 4.0 * th * dim if learns and name == "forward" else 0.0
        useful = Work(2.0 * products * dim * group * pairs, moved[name] - extra)
        parts.append(
            kernel(
                name,
                chip,
                moved=moved[name],
                l2=2 * own_visits.tiles * read * dim * item,
                operations=operations * own_visits.tiles,
                tensor_cores=mean,
                last=last,
                accesses=BEFORE_TILES,
                waves=len(own_visits.whole) / (blocks * chip.multiprocessors),
                work=useful,
            )
        )
    least = floors.attention(
        tokens, heads, dim, pairs=group * pairs, kept=kept, item=item, learns=learns
    )
    return together("attention", parts, least.floor(chip.ceilings))


def lists(
    chip: Chip,
    tokens: int,
    kv_heads: int,
    dim: int,
    item: int,
    kept: int,
    configs: Configs,
    learns: bool,
    packed: bool,
) -> list[Estimate]:
    """The kernels before the forward kernel: positions, `span`, `count`, `write`, `copy`, `plan`.

    Accesses: `span` walks 1024 queries at a time, `write` sums 32 counts of 256 tokens at a time,
    `plan` compares with 64 blocks at a time. In a packed batch `shift` comes to them, and the op
    counts positions by six ops of torch in place of one.
    """
    used = configs if learns else configs[:1]
    largest, unit = (found(one.keys for one in used) for found in (max, min))
    slots = -(-tokens // largest) * largest + largest
    own, programs = tokens * kv_heads, math.ceil(tokens / 256)
    counts = 64 * programs * kv_heads
    most = max(slots // unit, math.ceil(tokens / min(one.queries for one in used)))
    extremes = 16 * slots // unit * kv_heads
    planned = sum(math.ceil(tokens / one.queries / 16) for one in used[:2]) * kv_heads
    if learns:
        planned += math.ceil(slots / configs[2].keys / 16) * kv_heads
    copied = 4 * kept * dim * item
    parts = [
        kernel("positions", chip, launches=6 if packed else 1, moved=4.0 * tokens),
        kernel("span", chip, moved=4.0 * tokens, accesses=ANY_OP + math.ceil(tokens / 1024)),
        kernel("count", chip, moved=4.0 * own + 12 * tokens + counts, accesses=3),
        kernel(
            "write",
            chip,
            moved=4.0 * own + 12 * slots * kv_heads + counts,
            l2=float(counts * programs),
            accesses=3 + math.ceil(programs / 32),
        ),
        kernel("copy", chip, moved=copied + 12.0 * slots * kv_heads, accesses=3),
        kernel(
            "plan",
            chip,
            moved=4.0 * tokens + extremes,
            l2=float(planned * extremes / kv_heads),
            accesses=3 + math.ceil(most / 64),
        ),
    ]
    if packed:
        parts.insert(2, kernel("shift", chip))
    return parts


def dense(
    chip: Chip, case: str, tokens: int, heads: int, dim: int, *, item: int = 2, learns: bool
) -> Estimate:
    """Causal attention over everything by `flash`, `cudnn` or `flash-3`, at published rates."""
    pairs = heads * floors.causal_pairs(tokens)
    work = floors.attention(
        tokens, heads, dim, pairs=pairs, kept=tokens * heads, item=item, learns=learns
    )
    forward = 4.0 * dim * pairs
    peak = chip.operations_per_second
    seconds = forward / (chips.DENSE_FORWARD[case] * peak)
    if learns:
        back = floors.BACKWARD_ATTENTION * forward
        seconds += back / (chips.DENSE_BACKWARD[case] * peak)
    # the backward pass also sums out * gradient, and converts the gradient of q
    return kernel(
        case,
        chip,
        launches=4 if learns else 1,
        moved=work.bytes,
        operations=work.operations,
        tensor_cores=seconds,
        work=work,
    )


def flex(
    chip: Chip,
    evict_at: Tensor,
    heads: int,
    dim: int,
    *,
    item: int = 2,
    learns: bool,
    compact: bool,
    until: Tensor | None = None,
) -> Estimate:
    """FlexAttention over blocks of 128 x 128: over all keys, or with `compact` the stored ones.

    Its rate is a part of `flash`. Without `compact` a block is visited if any key of it is seen,
    which random lifetimes do to all of them. With it keys and values are permuted, which moves each
    twice, by about thirty ops of torch.
    """
    _, tokens, kv_heads = evict_at.shape
    group = heads // kv_heads
    pairs, kept = seen(evict_at)
    least = floors.attention(
        tokens, heads, dim, pairs=group * pairs, kept=kept, item=item, learns=learns
    )
    if compact:
        config = import_module(TUNED).Config(128, 128, 4, 2)
        (visited,) = counted(evict_at, (config,) * 3, group=group, keep=False, until=until)
        tiles = visited.tiles
    else:
        blocks = math.ceil(tokens / 128)
        tiles = heads * blocks * (blocks + 1) // 2
    forward = 4.0 * dim * 128 * 128 * tiles
    peak = chips.FLEX * chip.operations_per_second
    seconds = forward / (chips.DENSE_FORWARD["flash"] * peak)
    operations = forward
    if learns:
        seconds += forward * floors.BACKWARD_ATTENTION / (chips.DENSE_BACKWARD["flash"] * peak)
        operations *= 1 + floors.BACKWARD_ATTENTION
    moved = least.bytes + compact * 8.0 * tokens * kv_heads * dim * item
    return kernel(
        "flex-compact" if compact else "flex",
        chip,
        launches=(30 if compact else 10) * (1 + learns),
        moved=moved,
        operations=operations,
        tensor_cores=seconds,
        work=least,
    )


def of_case(
    case: str,
    chip: Chip,
    evict_at: Tensor,
    heads: int,
    dim: int,
    *,
    item: int = 2,
    learns: bool,
    until: Tensor | None = None,
) -> Estimate | None:
    """The estimate of a case of attention, as `benchmarks/gpu.py` names them; None for others."""
    given: dict[str, Any] = {"item": item, "learns": learns}
    if case in DENSE:
        return dense(chip, case, evict_at.shape[1], heads, dim, **given)
    if case == "triton":
        return attention(chip, evict_at, heads, dim, until=until, **given)
    if case in ("flex", "flex-compact"):
        compact = case == "flex-compact"
        return flex(chip, evict_at, heads, dim, compact=compact, until=until, **given)
    return None


def delta_rule(
    chip: Chip,
    tokens: int,
    heads: int,
    dim: int,
    *,
    item: int = 2,
    residual: bool,
    score: bool,
    learns: bool,
) -> Estimate:
    """The gated delta rule of fla: kernels that leave their results in memory for the next.

    A token and head of the forward kernels move, in entries of D: k (decays and inverse), 4 (w and
    u), 4 (the states: k, w, u and v_new) and 5 (out: q, k, v_new, out and, for residual and score,
    v_new again), besides the state of every chunk, written and read, D D / C each, and the C C
    matrices, four times. Backward 34 D, 4 D D / C and the matrices again. The states are a chain of
    chunks: each waits for three accesses.
    """
    th, chunks = tokens * heads, math.ceil(tokens / CHUNK)
    state, matrix = dim * dim / CHUNK * item, 4.0 * CHUNK
    more = (residual or score) * dim * item + residual * dim * item
    work = floors.delta_rule(
        tokens, heads, dim, item=item, residual=residual, score=score, learns=learns
    )
    forward = floors.delta_rule(
        tokens, heads, dim, item=item, residual=residual, score=score, learns=False
    )

    def part(
        name: str, launches: int, entries: float, states: float, share: float, chained: bool
    ) -> Estimate:
        moved = th * (entries * dim * item + states * state + 2 * matrix)
        operations = share * work.operations
        peak = chip.operations_per_second * chips.TRITON_BACKWARD
        return kernel(
            name,
            chip,
            launches=launches,
            moved=moved,
            operations=operations,
            tensor_cores=operations / peak,
            accesses=3.0 * chunks if chained else ANY_OP,
            work=Work(operations, 0),
        )

    own = forward.operations / work.operations
    parts = [
        part("inverse, w and u", 4, 5, 0, own / 2, False),
        part("states", 1, 4, 1, own / 4, True),
        part("out", 1, 4, 1, own / 4, False),
    ]
    if more:
        parts.append(kernel("residual and score", chip, moved=th * (more + dim * item + 8)))
    if learns:
        parts += [
            part("w, u and states again", 2, 8, 1, (1 - own) / 4, True),
            part("gradient of states", 2, 10, 1, (1 - own) / 4, True),
            part("gradients of q, k, v", 4, 16, 2, (1 - own) / 2, False),
        ]
    return together("delta rule", parts, work.floor(chip.ceilings))


def layer(
    chip: Chip,
    tokens: int,
    hidden: int,
    heads: int,
    dim: int,
    *,
    attends: str,
    evict_at: Tensor,
    item: int = 2,
    mode: str,
) -> Estimate:
    """A layer, forward and backward.

    Args:
        chip: the GPU.
        tokens: T.
        hidden: hidden size.
        heads: heads of memory and attention.
        dim: head size.
        attends: the case of its attention (see `of_case`).
        evict_at: int32 `[1, T, heads]`.
        item: bytes of an entry.
        mode: "eager" or "compiled".
    """
    attending = of_case(attends, chip, evict_at, heads, dim, item=item, learns=True)
    if attending is None:
        raise ValueError(f"attends: expected a case with an estimate, got {attends!r}")
    pairs, kept = seen(evict_at)
    least = floors.layer(tokens, hidden, heads, dim, pairs=pairs, kept=kept, item=item)
    weights = 4 * hidden * heads * dim + 4 * heads * hidden
    operations, left = 6.0 * tokens * weights, FUSED if mode == "compiled" else 1.0
    products = kernel(
        "projections",
        chip,
        launches=3 * 7,
        moved=item * (9.0 * tokens * (hidden + heads * dim) + 3 * weights),
        operations=operations,
        tensor_cores=operations / chip.ceilings.operations_per_second,
        work=Work(operations, 0),
    )
    delta = delta_rule(chip, tokens, heads, dim, item=item, residual=False, score=True, learns=True)
    parts = [products, delta, attending]
    for which, (ops, passes) in ELEMENTWISE.items():
        moved = left * passes * item * tokens * heads * dim
        launches = math.ceil(left * ops)
        name = f"ops of torch, {which}"
        # they could be parts of the products
        parts.append(kernel(name, chip, launches=launches, moved=moved, work=Work(0, 0)))
    return together("layer", parts, least.floor(chip.ceilings))


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
