"""A whole HAM layer that stores half of its tokens, against the same layer that stores them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import hamblocks as hb
from hamblocks.attention import rotate
from hamblocks.ops import selected_attention
from hamblocks.protocols import LayerDims
from measuring import floors
from measuring.attend import sdpa, seen
from measuring.checks import GRADIENT, SampledAttention, error, within
from measuring.clock import Clock, Contender, race
from measuring.sizes import Sizes
from measuring.targets import TRAINING

EVERYTHING = float("-inf")
COMPILED = 2.0**-5
"""Error allowed between compiled and eager: other roundings move a score over the threshold here and there."""


class FlashAttention(nn.Module):
    """The part that attends to everything by FlashAttention: what a layer without selection would use."""

    def build(self, dims: LayerDims) -> None:
        self.normed = hb.SelectedAttention()
        self.normed.build(dims)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, **given: Any
    ) -> tuple[Tensor, None]:
        q, k = normed(self.normed, q, k, given["position"])
        return sdpa(SDPBackend.FLASH_ATTENTION)(q, k, v), None


def shapes(sizes: Sizes) -> tuple[int, ...]:
    return sizes.layer_tokens


def normed(
    part: hb.SelectedAttention, q: Tensor, k: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys as they are attended with."""
    q, k = part.q_norm(q), part.k_norm(k)
    return rotate(q, position, part.rope_theta), rotate(k, position, part.rope_theta)


def build(sizes: Sizes, tau: float, attention: Any = None) -> hb.HAMLayer:
    """The same weights every time."""
    torch.manual_seed(0)
    delta, attends = ("fla", "triton") if sizes.gpu else ("auto", "auto")
    layer = hb.HAMLayer(
        sizes.hidden,
        sizes.heads,
        head_dim=sizes.head_dim,
        memory=hb.GatedDeltaMemory(impl=delta),
        gate=hb.PredictionError("cosine"),
        selector=hb.Threshold(tau),
        attention=hb.SelectedAttention(impl=attends) if attention is None else attention,
    )
    return layer.to(sizes.device, sizes.dtype)


def check_parts(layer: hb.HAMLayer, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    """Attention against dense attention of a sample, on what it is given inside the layer; the memory against torch."""
    given: dict[str, Any] = {}

    def keep(part: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given[part] = args, kwargs, result[0]

    hooks = [
        part.register_forward_hook(keep, with_kwargs=True)
        for part in (layer.memory, layer.attention)
    ]
    try:
        with torch.no_grad():
            layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    args, kwargs, read = given.pop(layer.memory)
    impl, layer.memory.impl = layer.memory.impl, "chunked" if x.is_cuda else "reference"
    try:
        with torch.no_grad():
            exact, _, _ = layer.memory(*args, **kwargs)
        checked = {
            "memory": within(
                f"{layer.memory.impl}", {"read": error(read, exact)}, {"read": GRADIENT}
            )
        }
    finally:
        layer.memory.impl = impl
    (q, k, v, evict_at), kwargs, _ = given.pop(layer.attention)
    if isinstance(layer.attention, FlashAttention):
        part, attend = layer.attention.normed, sdpa(SDPBackend.FLASH_ATTENTION)
    else:
        part = layer.attention
        attend = lambda *qkv: selected_attention(*qkv, evict_at, impl=part.impl).out  # noqa: E731
    with torch.no_grad():
        q, k = normed(part, q, k, kwargs["position"])
    sample = SampledAttention(q, k, v, evict_at.expand(*k.shape[:3]), cotangent)
    return checked | {"attention": sample.check(attend, learns=True)}


def check_compiled(compiled: Any, layer: hb.HAMLayer, x: Tensor) -> dict[str, Any]:
    """Against the layer itself, with a gradient asked for: that is what is compiled once and timed."""
    x = x.detach().requires_grad_()
    exact, got = layer(x), compiled(x)
    moved = float((got.stats.evict_at != exact.stats.evict_at).float().mean())
    checked = within("the layer, not compiled", {"y": error(got.y, exact.y)}, {"y": COMPILED})
    return checked | {"decisions that differ": moved}


def rows(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    everything = build(sizes, EVERYTHING)
    x, y = (
        torch.randn(1, tokens, sizes.hidden, device=sizes.device, dtype=sizes.dtype)
        for _ in range(2)
    )
    reads = torch.randn(
        1, tokens, sizes.heads, sizes.head_dim, device=sizes.device, dtype=sizes.dtype
    )
    with torch.no_grad():
        tau = float(everything(x).stats.score.float().median())
        layers = {"selected": build(sizes, tau), "everything": everything}
        stats = layers["selected"](x).stats
    layers["everything by FlashAttention"] = build(sizes, EVERYTHING, FlashAttention())
    pairs, kept = seen(stats.evict_at.expand(1, tokens, sizes.heads))
    full = sizes.heads * floors.causal_pairs(tokens), sizes.heads * tokens

    def contender(case: str, mode: str) -> Contender:
        layer = layers[case]
        run = (
            layer
            if mode == "eager"
            else torch.compile(layer, fullgraph=True, backend=sizes.backend, dynamic=False)
        )

        def call() -> object:
            given = x.detach().requires_grad_()
            return torch.autograd.grad(run(given).y, [given, *layer.parameters()], y)

        def check() -> dict[str, Any]:
            return (
                check_parts(layer, x, reads) if mode == "eager" else check_compiled(run, layer, x)
            )

        number, stored = (pairs, kept) if case == "selected" else full
        work = floors.layer(
            tokens,
            sizes.hidden,
            sizes.heads,
            sizes.head_dim,
            pairs=number,
            kept=stored,
            item=x.element_size(),
        )
        row = {"case": case, "mode": mode, "kept": stored / full[1]}
        return Contender(row | ({"tau": tau} if case == "selected" else {}), call, check, work)

    torch.compiler.reset()  # or compilations of other lengths count against torch's limit for one function
    contenders = [contender(case, mode) for mode in ("eager", "compiled") for case in layers]
    yield from race(
        contenders, clock, ceilings, {"part": "layer", "tokens": tokens, "pass": TRAINING}
    )
