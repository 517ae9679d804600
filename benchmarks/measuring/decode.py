"""Decoding after a context at several keep fractions: tokens per second and bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import hamblocks as hb
from measuring import floors
from measuring.checks import WrongResultError
from measuring.clock import WARM_UP_ROUNDS, Clock, Timing, reason
from measuring.sizes import Sizes

KEEP_FRACTIONS = (1.0, 0.5, 0.25, 0.1)
"""1 stores everything, whatever the scores are."""


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Context lengths that are measured."""
    return sizes.contexts


def measure(
    context: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of attention over a dense cache, and of a layer at every keep fraction."""
    common = {"part": "decode", "tokens": context}
    yield common | dense_cache(context, sizes, clock, ceilings)
    for fraction in KEEP_FRACTIONS:
        clock.release()
        measured = {**common, "case": "one layer", "fraction": fraction}
        try:
            measured |= one_layer(context, fraction, sizes, clock)
        except Exception as error:
            measured["reason"] = reason(error)
            clock.say(f"context {context:,}, keep {fraction}: {measured['reason']}")
            yield measured
            continue
        measured["floor"] = floors.decode(measured["cache_bytes"]).floor(ceilings)
        print(
            f"context {context:>7,}  keep {measured['kept']:.2f}  "
            f"{measured['tokens_per_second']:>9,.0f} tokens/s  "
            f"{measured['cache_bytes']:>14,} bytes  floor {1e6 * measured['floor']:>8,.0f} us  "
            f"took {1e6 * measured['seconds']:>8,.0f} us",
            flush=True,
        )
        yield measured


def timed(call: Callable[[], object], clock: Clock) -> Timing:
    """Times one call alone.

    Raises:
        RuntimeError: it failed.
    """
    timings, reasons = clock.turns({"it": call})
    if reasons:
        raise RuntimeError(reasons["it"])
    return timings["it"]


@torch.no_grad()
def dense_cache(
    context: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> dict[str, Any]:
    """Time and floor of attention over a dense cache of all tokens, or why there is none."""
    measured: dict[str, Any] = {"case": "a dense cache, attention alone"}
    nbytes = 2 * sizes.decode_batch * sizes.heads * context * sizes.head_dim * sizes.dtype.itemsize
    try:
        shape = sizes.decode_batch, sizes.heads, context, sizes.head_dim
        k, v = (torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
        q = k[:, :, :1].clone()
        timing = timed(lambda: scaled_dot_product_attention(q, k, v), clock)
    except Exception as error:
        return measured | {"reason": reason(error)}
    took = f"{1e6 * timing.seconds:,.0f} us"
    print(f"context {context:>7,}  a dense cache, attention alone: {took}", flush=True)
    return measured | timing._asdict() | {"floor": floors.decode(nbytes).floor(ceilings)}


@torch.no_grad()
def one_layer(context: int, fraction: float, sizes: Sizes, clock: Clock) -> dict[str, Any]:
    """Time and bytes of one token of every sequence after a context."""
    layer, state = prefilled(context, fraction, sizes)
    checked = check_paged(state, sizes)
    x = torch.randn(sizes.decode_batch, sizes.hidden, device=sizes.device, dtype=sizes.dtype)
    state.reserve(WARM_UP_ROUNDS + clock.rounds)

    def step() -> None:
        nonlocal state
        _, state, _ = layer.decode(x, state)

    timing = timed(step, clock)
    return {
        "kept": float(state.cache.tokens.double().mean() / state.position.double().mean()),
        **timing._asdict(),
        "tokens_per_second": sizes.decode_batch / timing.seconds,
        "cache_bytes": state.cache.nbytes,
        "capacity_bytes": state.cache.capacity_nbytes,
        **checked,
    }


def prefilled(context: int, fraction: float, sizes: Sizes) -> tuple[hb.HAMLayer, hb.HAMState]:
    """A layer that stores a random fraction of the tokens, and its state after the context."""
    torch.manual_seed(0)
    device, dtype, batch = sizes.device, sizes.dtype, sizes.decode_batch
    selector = hb.Threshold(float("-inf") if fraction == 1 else 1 - fraction)
    gate = hb.RandomGate(per="position", heads="own")
    layer = hb.HAMLayer(
        sizes.hidden, sizes.heads, head_dim=sizes.head_dim, gate=gate, selector=selector
    )
    layer = layer.to(device, dtype).eval()
    state = layer.init_state(batch)
    for piece in torch.arange(context).split(sizes.decode_piece):
        x = torch.randn(batch, len(piece), sizes.hidden, device=device, dtype=dtype)
        _, state, _ = layer.prefill(x, state)
    return layer, state


def check_paged(state: hb.HAMState, sizes: Sizes) -> dict[str, Any]:
    """Compares the op that reads the cache with its reference in float64, on the first sequence.

    Raises:
        WrongResultError: its error is more than twice that of the reference in this dtype.
    """
    first = torch.zeros(1, dtype=torch.int64, device=sizes.device)
    one = state.fork().reorder(first)
    q = torch.randn(1, 1, sizes.heads, sizes.head_dim, device=sizes.device, dtype=sizes.dtype)
    keys = one.cache.keys(one.position[:, None])
    dense = keys.dense()
    wide = hb.DenseKeys(
        dense.k.double(),
        dense.v.double(),
        position=dense.position,
        evict_at=dense.evict_at,
        query_position=dense.query_position,
    )
    exact = wide.attend(q.double(), impl="reference").out

    def error_of(impl: str) -> float:
        return float((keys.attend(q, impl=impl).out.double() - exact).norm() / exact.norm())

    error, own = error_of("auto"), error_of("reference")
    if not error <= 2 * own + torch.finfo(sizes.dtype).eps:
        raise WrongResultError(
            f"paged_attention: error {error:.1e} against float64, the reference's {own:.1e}"
        )
    return {
        "checked": {
            "against": "the dense reference in float64",
            "error": error,
            "own error of the reference": own,
        },
        "impl": keys.explain(q).chosen,
    }
