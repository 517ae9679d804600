"""What `make bench-compare` times: one table of ops and of the layer, at shapes for a CPU.

A case makes a call and, beside it, what its result must be close to: nothing is timed before the
two were compared. Only names that every revision has are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hamblocks as hb
from hamblocks import ops

Call = Callable[[], Any]


class Case(NamedTuple):
    """A call to time.

    Attributes:
        call: the call; it may be made any number of times.
        check: raises AssertionError if the call's result is wrong.
    """

    call: Call
    check: Callable[[], None]


class Shape(NamedTuple):
    """Sizes of a case.

    Attributes:
        tokens: T.
        heads: H = Hkv.
        head_dim: D.
        fraction: share of the tokens that are stored.
        hidden: hidden size of a layer.
    """

    tokens: int = 4096
    heads: int = 4
    head_dim: int = 64
    fraction: float = 0.25
    hidden: int = 256


def cases(small: bool = False, topk_tokens: int | None = None) -> dict[str, Callable[[], Case]]:
    """All cases by name; `small` ones take milliseconds, `topk_tokens` is T of `select_topk`."""
    shape = Shape(128, 2, 16, 0.25, 32) if small else Shape()
    few, half = shape._replace(fraction=0.1), shape._replace(fraction=0.5)
    long = shape._replace(tokens=topk_tokens or 4 * shape.tokens)
    table: dict[str, Callable[[], Case]] = {
        "gated_delta_rule, forward": lambda: _delta(shape, False),
        "gated_delta_rule, forward and backward": lambda: _delta(shape, True),
        "selected_attention at 0.1, forward": lambda: _attention(few, False),
        "selected_attention at 0.25, forward": lambda: _attention(shape, False),
        "selected_attention at 0.5, forward": lambda: _attention(half, False),
        "selected_attention at 0.25, forward and backward": lambda: _attention(shape, True),
        "select_topk": lambda: _topk(long),
        "layer, forward": lambda: _layer(shape, False),
        "layer, forward and backward": lambda: _layer(shape, True),
        "layer, prefill": lambda: _prefill(shape),
        "layer, decode": lambda: _decode(shape, hb.Threshold(0.75)),
        "layer, decode with TopK": lambda: _decode(shape, hb.TopK(shape.tokens // 8)),
    }
    return table


def _close(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < 1e-4, f"relative error {error:.1e}"


def _trained(call: Callable[..., Tensor], *leaves: Tensor) -> Call:
    """The call with its backward pass, for a fixed gradient of the output."""
    with torch.no_grad():
        out = call(*leaves)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(call(*leaves), leaves, gradient)


def _untrained(call: Callable[..., Tensor], *leaves: Tensor) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    return run


def _delta(shape: Shape, trains: bool) -> Case:
    sizes = 1, shape.tokens, shape.heads, shape.head_dim
    q, k, v = (torch.nn.functional.normalize(torch.randn(sizes), dim=-1) for _ in range(3))
    beta, g = torch.rand(sizes[:3]), -torch.rand(sizes[:3]) / 50
    leaves = [x.requires_grad_(trains) for x in (q, k, v, beta, g)]

    def run(impl: str = "auto", tokens: int | None = None) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
            q, k, v, beta, g = (x[:, :tokens] for x in (q, k, v, beta, g))
            result = ops.gated_delta_rule(q, k, v, beta=beta, g=g, impl=impl)
            assert result.residual is not None
            return torch.cat([result.out, result.residual], -1)

        return call

    def check() -> None:
        tokens = min(shape.tokens, 512)  # the reference goes token by token
        with torch.no_grad():
            _close(run(tokens=tokens)(*leaves), run("reference", tokens)(*leaves))

    make = _trained if trains else _untrained
    return Case(make(run(), *leaves), check)


def _attention(shape: Shape, trains: bool) -> Case:
    sizes = 1, shape.tokens, shape.heads, shape.head_dim
    leaves = [torch.randn(sizes).requires_grad_(trains) for _ in range(3)]
    evict_at = ops.select_threshold(torch.rand(sizes[:3]), 1 - shape.fraction)

    def run(impl: str) -> Callable[..., Tensor]:
        return lambda q, k, v: ops.selected_attention(q, k, v, evict_at, impl=impl).out

    def check() -> None:
        with torch.no_grad():
            for head in range(shape.heads):  # all heads at once would take gigabytes
                one = [x[:, :, head : head + 1] for x in (*leaves, evict_at)]
                fast, exact = (
                    ops.selected_attention(*one, impl=impl).out for impl in ("auto", "reference")
                )
                _close(fast, exact)

    make = _trained if trains else _untrained
    return Case(make(run("auto"), *leaves), check)


def _topk(shape: Shape) -> Case:
    score = torch.rand(1, shape.tokens, shape.heads)
    k = shape.tokens // 16

    def check() -> None:
        few = score[:, : 4 * k]
        place = torch.arange(few.shape[1])
        # after each token min(k, tokens so far) are stored, at the end those of the largest scores
        evict_at = ops.select_topk(few, k)[0].long()
        stored = (place[:, None] <= place) & (evict_at.T[:, :, None] > place)
        assert (stored.sum(1) == (place + 1).clamp(max=k)).all()
        largest = few[0].topk(k, 0).indices.sort(0).values
        assert torch.equal(stored[:, :, -1].nonzero()[:, 1].view(-1, k), largest.T)

    return Case(lambda: ops.select_topk(score, k), check)


def _made(shape: Shape, selector: Any) -> tuple[hb.HAMLayer, Tensor]:
    layer = hb.HAMLayer(
        shape.hidden,
        shape.heads,
        head_dim=shape.head_dim,
        gate=hb.RandomGate(per="position", heads="own"),
        selector=selector,
    )
    return layer.eval(), torch.randn(1, shape.tokens, shape.hidden)


def pieces(layer: hb.HAMLayer, x: Tensor) -> Callable[[], None]:
    """The check of a layer: one pass is what prefill and decode give."""

    def check() -> None:
        with torch.no_grad():
            whole = layer(x).y
            y, state, _ = layer.prefill(x[:, :-1])
            last, _, _ = layer.decode(x[:, -1], state)
            _close(torch.cat([y, last[:, None]], 1), whole)

    return check


def _layer(shape: Shape, trains: bool) -> Case:
    layer, x = _made(shape, hb.Threshold(1 - shape.fraction) | hb.Window(16))
    make = _trained if trains else _untrained
    x.requires_grad_(trains)
    return Case(make(lambda x: layer(x).y, x), pieces(layer, x.detach()))


def _prefill(shape: Shape) -> Case:
    layer, x = _made(shape, hb.Threshold(1 - shape.fraction) | hb.Window(16))
    return Case(_untrained(lambda x: layer.prefill(x).y, x), pieces(layer, x))


def _decode(shape: Shape, selector: Any) -> Case:
    layer, x = _made(shape, selector)
    with torch.no_grad():
        state = layer.prefill(x).state
    token = x[:, 0]

    def call() -> None:
        nonlocal state
        with torch.no_grad():
            state = layer.decode(token, state).state

    return Case(call, pieces(layer, x))
