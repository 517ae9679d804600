"""Launches of the Triton kernels of selected attention: all that may be fast, and the line to paste.

For each kernel the tile, warps and stages vary while the other two keep theirs. The winners stand
in one line, as `ops/hamblocks_ops/selected_attention/triton/sizes.py` takes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from measuring import estimates, floors
from measuring.attend import scattered, selected
from measuring.checks import SampledAttention
from measuring.clock import Clock, Contender, NotHereError, race
from measuring.sizes import Sizes
from measuring.targets import FORWARD, TRAINING
from measuring.visits import seen

KERNELS = ("forward", "queries_grad", "keys_grad")
"""In the order of the tables. The first is timed in the forward pass, the others with it."""
QUERIES, KEYS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
LEAST_TILE, LARGEST_TILE = 64 * 32, 128 * 128
"""Queries times keys of a tile. Smaller tiles starve the tensor cores, larger ones spill."""
FRACTION = 0.25
TUNED = "hamblocks_ops.selected_attention.triton"
"""The module that looks its launches up. An attribute of the package names the op, not the folder."""
Configs = tuple[Any, ...]


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """The shortest length of the ops."""
    return (min(sizes.op_tokens),)


def grid() -> list[tuple[int, int, int, int]]:
    """Queries, keys, warps and stages of the launches that are tried."""
    return [
        (queries, keys, warps, stages)
        for queries, keys, warps, stages in itertools.product(QUERIES, KEYS, WARPS, STAGES)
        if LEAST_TILE <= queries * keys <= LARGEST_TILE
    ]


def with_launch(
    base: Configs, place: int, launch: tuple[int, int, int, int], call: Callable[[], Any]
) -> Callable[[], Any]:
    """A call with one launch of `base` replaced."""
    config = type(base[place])(*launch)
    configs = (*base[:place], config, *base[place + 1 :])

    def run() -> Any:
        with patch.object(import_module(TUNED), "configs_of", lambda *_: configs):
            return call()

    return run


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Times of every launch of every kernel, and at the end the line of the winners."""
    common = {"part": "sweep", "tokens": tokens}
    if not sizes.gpu:
        raise NotHereError("launches are timed on a GPU")
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(4)
    )
    evict_at = scattered(FRACTION, tokens, sizes.heads, sizes.device)
    exact = SampledAttention(q, k, v, evict_at, cotangent)
    base, attend = import_module(TUNED).configs_of(q, k, None), selected(evict_at, "triton")
    pairs, kept = seen(evict_at)
    best: list[Configs] = []
    for place, kernel in enumerate(KERNELS):
        learns = place > 0

        def call(learns: bool = learns) -> object:
            given: list[Tensor] = [x.detach().requires_grad_(learns) for x in (q, k, v)]
            with torch.set_grad_enabled(learns):
                out = attend(*given)
            return torch.autograd.grad(out, given, cotangent) if learns else out

        def contender(
            launch: tuple[int, int, int, int],
            place: int = place,
            kernel: str = kernel,
            learns: bool = learns,
            call: Callable[[], object] = call,
        ) -> Contender:
            work = floors.attention(
                *shape[1:], pairs=pairs, kept=kept, item=q.element_size(), learns=learns
            )
            launches = (*base[:place], type(base[place])(*launch), *base[place + 1 :])
            estimate = clock.chip and estimates.attention(
                clock.chip, evict_at, *shape[2:], learns=learns, configs=launches
            )
            return Contender(
                {"case": described(kernel, launch), "launch": launch},
                with_launch(base, place, launch, call),
                with_launch(base, place, launch, lambda: exact.check(attend, learns)),
                work,
                estimate,
            )

        tried = [contender(one) for one in {tuple(base[place]): None} | dict.fromkeys(grid())]
        which = TRAINING if learns else FORWARD
        measured = race(tried, clock, ceilings, common | {"pass": which})
        yield from measured
        best.append(fastest(measured, base[place]))
    line = pasted(best, base, max(sizes.head_dim, 64), str(sizes.device))
    clock.say(line)
    yield {**common, "case": "winners", "line": line, "reason": line}


def described(kernel: str, launch: tuple[int, int, int, int]) -> str:
    """One launch of a kernel in words."""
    queries, keys, warps, stages = launch
    return f"{kernel} {queries} x {keys}, {warps} warps, {stages} stages"


def fastest(measured: list[dict[str, Any]], kept: Configs) -> Configs:
    """The launch with the least time; the one that is there if none was timed."""
    timed = [one for one in measured if "seconds" in one]
    if not timed:
        return tuple(kept)
    return tuple(min(timed, key=lambda one: float(one["seconds"]))["launch"])


def pasted(best: list[Configs], base: Configs, width: int, device: str) -> str:
    """The line of the winners, for the table of this compute capability."""
    major = torch.cuda.get_device_capability(device)[0]
    configs = ", ".join(f"Config{tuple(one)}" for one in best)
    same = " (as it is)" if [tuple(one) for one in base] == [tuple(one) for one in best] else ""
    return f"SM{major}0: {width}: ({configs}),{same}"
