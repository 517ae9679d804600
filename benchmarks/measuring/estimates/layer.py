"""The gated delta rule, and a layer forward and backward."""

from __future__ import annotations

import math

from torch import Tensor

from measuring import chips, floors
from measuring.chips import Chip
from measuring.estimates.attention import of_case
from measuring.estimates.kernel import ANY_OP, Estimate, kernel, together
from measuring.floors import CHUNK, Work
from measuring.visits import seen

ELEMENTWISE = {"forward": (84, 206), "backward": (193, 535)}
"""The ops of torch in a layer beside the products of its projections, the delta rule and attention:
their number, and what they read and write in units of a bfloat16 tensor [T, heads * D]. A test counts
them."""
FUSED = 0.15
"""Part of these bytes and launches that is left in a compiled layer. Assumption."""


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
