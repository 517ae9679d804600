"""Decoding behind a context at several keep fractions, against attention over everything: tokens per second, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import hamblocks as hb
from hamblocks.ops import explain, paged_attention
from measuring import floors
from measuring.checks import WrongResultError
from measuring.clock import Clock, Timing, reason
from measuring.sizes import Sizes

FRACTIONS = (1.0, 0.5, 0.25, 0.1)
"""1 stores everything."""


def shapes(sizes: Sizes) -> tuple[int, ...]:
    return sizes.contexts


def rows(
    context: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    common = {"part": "decode", "tokens": context}
    nbytes = 2 * sizes.decode_batch * sizes.heads * context * sizes.head_dim * sizes.dtype.itemsize
    row = {**common, "case": "a dense cache, attention alone"}
    try:
        row |= everything(context, sizes, clock)._asdict() | {
            "floor": floors.decode(nbytes).floor(ceilings)
        }
        print(
            f"context {context:>7,}  a dense cache, attention alone: {1e6 * row['seconds']:,.0f} us",
            flush=True,
        )
    except Exception as error:
        row["reason"] = reason(error)
    yield row
    for fraction in FRACTIONS:
        clock.release()
        row = {**common, "case": "one layer", "fraction": fraction}
        try:
            row |= decode(context, fraction, sizes, clock)
        except Exception as error:
            row["reason"] = reason(error)
            clock.say(f"context {context:,}, keep {fraction}: {row['reason']}")
            yield row
            continue
        row["floor"] = floors.decode(row["cache_bytes"]).floor(ceilings)
        print(
            f"context {context:>7,}  keep {row['kept']:.2f}  {row['tokens_per_second']:>9,.0f} tokens/s  "
            f"{row['cache_bytes']:>14,} bytes  floor {1e6 * row['floor']:>8,.0f} us  "
            f"took {1e6 * row['seconds']:>8,.0f} us",
            flush=True,
        )
        yield row


def timed(call: Callable[[], object], clock: Clock) -> Timing:
    timings, reasons = clock.turns({"it": call})
    if reasons:
        raise RuntimeError(reasons["it"])
    return timings["it"]


@torch.no_grad()
def decode(context: int, fraction: float, sizes: Sizes, clock: Clock) -> dict[str, Any]:
    """Time and bytes of one token of every sequence behind a context."""
    torch.manual_seed(0)
    device, dtype, batch = sizes.device, sizes.dtype, sizes.decode_batch
    selector = hb.Threshold(float("-inf") if fraction == 1 else 1 - fraction)
    layer = hb.HAMLayer(
        sizes.hidden, sizes.heads, head_dim=sizes.head_dim, gate=hb.RandomGate(), selector=selector
    )
    layer = layer.to(device, dtype).eval()
    state = layer.init_state(batch)
    for piece in torch.arange(context).split(sizes.decode_piece):
        x = torch.randn(batch, len(piece), sizes.hidden, device=device, dtype=dtype)
        _, state, _ = layer.prefill(x, state)
    one = state.cache.fork().reorder(torch.zeros(1, dtype=torch.int64, device=device))
    q = torch.randn(1, 1, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
    arguments = q, one.slabs, one.block_table
    asked = one.seen[:, None]
    exactly = [slab._replace(k=slab.k.double(), v=slab.v.double()) for slab in one.slabs]
    exact = paged_attention(
        q.double(), exactly, one.block_table, query_position=asked, impl="reference"
    ).out
    error, own = (
        float(
            (
                paged_attention(*arguments, query_position=asked, impl=impl).out.double() - exact
            ).norm()
            / exact.norm()
        )
        for impl in ("auto", "reference")
    )
    if not error <= 2 * own + torch.finfo(dtype).eps:
        raise WrongResultError(
            f"paged_attention: error {error:.1e} against float64, the reference's {own:.1e}"
        )
    table = explain(paged_attention, *arguments, query_position=asked)
    x = torch.randn(batch, sizes.hidden, device=device, dtype=dtype)
    state.reserve(clock.rounds + 12)

    def step() -> None:
        nonlocal state
        _, state, _ = layer.decode(x, state)

    timing = timed(step, clock)
    return {
        "kept": float(state.cache.tokens.double().mean() / state.position.double().mean()),
        **timing._asdict(),
        "tokens_per_second": batch / timing.seconds,
        "cache_bytes": state.cache.nbytes,
        "capacity_bytes": state.cache.capacity_nbytes,
        "checked": {
            "against": "the dense reference in float64",
            "error": error,
            "own error of the reference": own,
        },
        "impl": table.chosen,
    }


@torch.no_grad()
def everything(context: int, sizes: Sizes, clock: Clock) -> Timing:
    """Time of attention over a dense cache of all tokens."""
    shape = sizes.decode_batch, sizes.heads, context, sizes.head_dim
    k, v = (torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    q = k[:, :, :1].clone()
    return timed(lambda: scaled_dot_product_attention(q, k, v), clock)
