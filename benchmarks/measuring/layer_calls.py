"""The whole layer on a CPU: what it stores, against everything, and against attention alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Shape, pieces
from torch import Tensor

import hamblocks as hb
from measuring import floors
from measuring.clock import Contender
from measuring.layer import check_parts

STORED = 512
"""Tokens that the layer of the growth curve stores."""
SEQUENCES = 4
"""Sequences that are decoded together."""
PIECE = 1024
"""Tokens per prefill call before decoding, which bounds its memory."""


def build(shape: Shape, selector: Any, **parts: Any) -> hb.HAMLayer:
    """A layer; the weights are the same every time, and so are the tokens that are stored."""
    torch.manual_seed(0)
    return hb.HAMLayer(
        shape.hidden,
        shape.heads,
        head_dim=shape.head_dim,
        gate=hb.RandomGate(per="position", heads="own"),
        selector=selector,
        **parts,
    ).eval()


def make(shape: Shape, run: str) -> dict[str, Callable[[], Contender]]:
    """The calls of a shape."""
    everything = float("-inf")

    def contender(fraction: float, **parts: Any) -> Contender:
        tau = everything if fraction == 1 else 1 - fraction
        layer = build(shape, hb.Threshold(tau), **parts)
        if run == "decode":
            return _decode(layer, shape, fraction)
        x = torch.randn(1, shape.tokens, shape.hidden, requires_grad=run == "both")
        if run == "prefill":
            return _contender(lambda: layer.prefill(x), pieces(layer, x), shape, fraction, run)

        def call() -> object:
            if run == "both":
                y = layer(x).y
                return torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
            return layer(x)

        def check() -> dict[str, Any]:
            reads = torch.randn(1, shape.tokens, shape.heads, shape.head_dim)
            return check_parts(layer, x, reads)

        return _contender(call, check, shape, fraction, run)

    def topk(shape: Shape) -> Contender:
        return _decode(build(shape, hb.TopK(256)), shape, 256 / shape.tokens)

    return {
        "HAM": lambda: contender(shape.fraction),
        "TopK(256)": lambda: topk(shape),
        "TopK(256) after T / 8": lambda: topk(shape._replace(tokens=shape.tokens // 8)),
        "HAM, everything stored": lambda: contender(1),
        "attention over everything, no memory": lambda: contender(1, memory=None),
    }


def make_growth(shape: Shape, run: str) -> dict[str, Callable[[], Contender]]:
    """A layer that stores a fixed number of tokens of any sequence."""

    def contender() -> Contender:
        layer = build(shape, hb.TopK(STORED))
        x = torch.randn(1, shape.tokens, shape.hidden)

        def check() -> dict[str, Any]:
            return check_parts(layer, x, torch.randn(1, shape.tokens, shape.heads, shape.head_dim))

        return _contender(lambda: layer(x), check, shape, STORED / shape.tokens, run)

    return {f"{STORED} tokens stored": contender}


def _contender(
    call: Callable[[], object],
    check: Callable[[], Any],
    shape: Shape,
    fraction: float,
    run: str,
) -> Contender:
    def timed() -> object:
        with torch.set_grad_enabled(run == "both"):
            return call()

    pairs = int(fraction * shape.heads * floors.causal_pairs(shape.tokens))
    kept = int(fraction * shape.heads * shape.tokens)
    size = shape.tokens, shape.hidden, shape.heads, shape.head_dim
    work = floors.layer(*size, pairs=pairs, kept=kept, item=4, learns=run == "both")
    return Contender({}, timed, lambda: check() or {"against": "one pass"}, work)


def _decode(layer: hb.HAMLayer, shape: Shape, fraction: float) -> Contender:
    tokens = torch.randn(SEQUENCES, shape.tokens, shape.hidden)
    state: Any = None
    with torch.no_grad():
        for piece in tokens.split(PIECE, 1):
            state = layer.prefill(piece, state=state).state
    begun = state

    def call() -> object:
        nonlocal state
        with torch.no_grad():
            y, state, _ = layer.decode(tokens[:, 0], state)
        return y

    def check() -> dict[str, Any]:
        few = tokens[:1, : 2 * PIECE]
        pieces(layer, few)()
        keys = begun.fork().cache.keys(begun.position[:, None])
        q: Tensor = torch.randn(SEQUENCES, 1, shape.heads, shape.head_dim)
        exact = keys.attend(q, impl="reference").out
        assert (keys.attend(q).out - exact).norm() <= 1e-5 * exact.norm()
        return {"against": "one pass, and reads of the reference"}

    cached = int(8 * SEQUENCES * shape.heads * shape.head_dim * fraction * shape.tokens)
    return Contender({}, call, check, floors.decode(cached))
