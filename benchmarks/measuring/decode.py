"""Decoding after a context at several keep fractions: tokens per second and bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hamblocks as hb
from hamblocks.state import leaves, tree_map
from measuring import estimates, floors
from measuring.checks import WrongResultError
from measuring.chips import Chip
from measuring.clock import WARM_UP_ROUNDS, Clock, NotHereError, Timing, beside, reason
from measuring.costs import costs
from measuring.sizes import Sizes

KEEP_FRACTIONS = (1.0, 0.5, 0.25, 0.1)
"""1 stores everything, whatever the scores are."""
MODES = ("eager", "graphed")
COUNTED_STEPS = 2
"""Steps that `costs` runs, before those that are timed."""
MAX_GRAPHED_ERROR = 2.0**-5
"""Relative error allowed between a graphed step and the same step in eager mode, by norm."""


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Context lengths that are measured."""
    return sizes.contexts


def measure(
    context: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of attention over a dense cache, and of a layer at every keep fraction."""
    common = {"part": "decode", "tokens": context}
    yield common | dense_cache(context, sizes, clock, ceilings)
    for fraction, mode in ((fraction, mode) for fraction in KEEP_FRACTIONS for mode in MODES):
        clock.release()
        measured: dict[str, Any] = {
            **common,
            "case": "one layer",
            "fraction": fraction,
            "mode": mode,
        }
        try:
            clock.in_time()
            measured |= one_layer(context, fraction, mode, sizes, clock)
        except Exception as error:
            measured["reason"] = reason(error)
            clock.say(f"context {context:,}, keep {fraction}, {mode}: {measured['reason']}")
            yield measured
            continue
        measured["floor"] = floors.decode(measured["cache_bytes"]).floor(ceilings)
        estimate = clock.chip and estimated(clock.chip, context, fraction, mode, sizes)
        measured |= beside(measured["seconds"], estimate)
        print(
            f"context {context:>7,}  keep {measured['kept']:.2f}  {mode:>7}  "
            f"{measured['tokens_per_second']:>9,.0f} tokens/s  "
            f"{measured['cache_bytes']:>14,} bytes  floor {1e6 * measured['floor']:>8,.0f} us  "
            f"took {1e6 * measured['seconds']:>8,.0f} us",
            flush=True,
        )
        yield measured


def estimated(
    chip: Chip, context: int, fraction: float, mode: str, sizes: Sizes
) -> estimates.Estimate:
    """What a token of the layer of `prefilled` should take after its context.

    Each piece of the prompt may add a slab to the pool, so the cache has several.
    """
    stored, streams = fraction * context, sizes.decode_batch * sizes.heads
    pieces = -(-context // sizes.decode_piece)
    pages = -(-round(stored / pieces) // estimates.PAGE) * streams
    slabs = estimates.slabs_of(pieces, pages)
    return estimates.decode(
        chip,
        stored,
        sizes.decode_batch,
        sizes.hidden,
        sizes.heads,
        sizes.head_dim,
        item=sizes.dtype.itemsize,
        graphed=mode == "graphed",
        slabs=tuple(own / sum(slabs) for own in slabs),
        launches=estimates.DECODE_LAUNCHES["Threshold"] + estimates.RANDOM_GATE,
    )


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
    measured |= timing._asdict() | {"floor": floors.decode(nbytes).floor(ceilings)}
    estimate = clock.chip and estimates.read_of_cache(clock.chip, nbytes)
    return measured | beside(timing.seconds, estimate)


@torch.no_grad()
def one_layer(
    context: int, fraction: float, mode: str, sizes: Sizes, clock: Clock
) -> dict[str, Any]:
    """Time and bytes of one token of every sequence after a context.

    mode is "eager", or "graphed" for a step that is replayed from a CUDA graph.
    """
    if mode == "graphed" and not sizes.gpu:
        raise NotHereError("a CUDA graph needs a GPU")
    layer, state = prefilled(context, fraction, sizes)
    checked = check_paged(state, sizes)
    x = torch.randn(sizes.decode_batch, sizes.hidden, device=sizes.device, dtype=sizes.dtype)
    # a graphed step is run once before it is captured, and replayed once to be checked
    steps = WARM_UP_ROUNDS + clock.rounds + COUNTED_STEPS + 2

    def eager() -> None:
        nonlocal state
        _, state, _ = layer.decode(x, state)

    if mode == "graphed":
        step = graphed(layer, x, state, steps)
    else:
        state.reserve(steps)
        step = eager
    taken = costs(step, sizes.gpu)
    timing = timed(step, clock)
    return {
        **taken,
        "kept": float(state.cache.tokens.double().mean() / state.position.double().mean()),
        **timing._asdict(),
        "tokens_per_second": sizes.decode_batch / timing.seconds,
        "cache_bytes": state.cache.nbytes,
        "capacity_bytes": state.cache.capacity_nbytes,
        **checked,
    }


def graphed(
    layer: hb.HAMLayer,
    x: Tensor,
    state: hb.HAMState,
    steps: int,
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
) -> Callable[[], None]:
    """A decode step that is replayed, with fixed addresses.

    What a step leaves is copied to where the next one takes it from. The pages have to be reserved:
    a replay does not run the host's accounting.

    Args:
        layer: the layer.
        x: `[B, hidden]`, the token of every step.
        state: the state before the first step.
        steps: how many steps are run in all.
        capture: records a step and returns its replay; None: a CUDA graph.

    Raises:
        WrongResultError: the first replay is not the second step in eager mode.
    """
    names = "position", "memory", "attention", "ledger"
    exact, expected = state.fork(), []
    exact.reserve(COUNTED_STEPS)
    for _ in range(COUNTED_STEPS):
        y, exact, _ = layer.decode(x, exact)
        expected.append(y)
    state.reserve(steps)  # after the fork, so that no page is shared
    own = tree_map(torch.clone, state.trees)
    state = state._replace(**dict(zip(names, own, strict=True)))
    last = torch.empty_like(expected[0])

    def step() -> None:
        y, after, _ = layer.decode(x, state)
        last.copy_(y)
        for old, new in zip(leaves(state.trees), leaves(after.trees), strict=True):
            old.copy_(new)

    replay = (capture or cuda_graph)(step)
    replay()
    error = float((last.double() - expected[1].double()).norm() / expected[1].double().norm())
    if not error <= MAX_GRAPHED_ERROR:
        raise WrongResultError(f"graphed step: error {error:.1e} against the eager one")
    return replay


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Runs a step once, captures it, and returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


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
