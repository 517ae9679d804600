"""Attention over stored keys, and what it is compared with."""

from __future__ import annotations

import functools
import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from measuring import chips, floors
from measuring.chips import Chip
from measuring.estimates.kernel import ANY_OP, Estimate, kernel, together
from measuring.estimates.programs import blocks_at_once, busy
from measuring.floors import Work
from measuring.targets import DENSE
from measuring.visits import Configs, seen, visits

TUNED = "hamblocks_ops.selected_attention.triton.sizes"
"""The module of launches. It needs Triton, so it is imported where an estimate is made."""
PRODUCTS = {"forward": 2, "queries_grad": 3, "keys_grad": 4}
"""Products of a tile. The backward kernels compute q k^T and the gradient of the weights twice."""
BEFORE_TILES = 4
"""Accesses that depend on each other before a program's first tile: plan, range, list, keys."""

counted = functools.lru_cache(maxsize=32)(visits)
"""The visits of the same lifetimes serve several estimates. Lifetimes are never changed in place."""


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
