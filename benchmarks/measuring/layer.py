"""A whole HAM layer that stores half of its tokens, against the same layer that stores them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import hamblocks as hb
from hamblocks.protocols import LayerDims
from hamblocks_ops.packing import NEVER
from measuring import estimates, floors
from measuring.attend import sdpa, selected
from measuring.checks import FLOAT32, MAX_GRADIENT_ERROR, SampledAttention, error, within
from measuring.clock import Clock, Contender, race
from measuring.sizes import Sizes
from measuring.targets import TRAINING
from measuring.visits import seen

STORE_EVERYTHING = float("-inf")
"""Threshold that every score reaches."""
CASES = {
    "selected": "triton",
    "everything": "triton",
    "everything by FlashAttention": "flash",
}
"""How the attention of each layer is called in the part `attention`."""
MAX_COMPILED_ERROR = 2.0**-5
"""Relative error allowed between compiled and eager. They round differently, so that a few scores
fall on the other side of the threshold."""


class FlashAttention(nn.Module):
    """Attends to everything by FlashAttention, as a layer without selection would."""

    def build(self, dims: LayerDims) -> None:
        self.normed = hb.SelectedAttention()
        self.normed.build(dims)

    def prepare(self, *tokens: Tensor, **where: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.normed.prepare(*tokens, **where)

    def forward(self, q: Tensor, keys: hb.Keys) -> Tensor:
        dense = keys.dense()
        return sdpa(SDPBackend.FLASH_ATTENTION)(q, dense.k, dense.v)


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Sequence lengths that are measured."""
    return sizes.layer_tokens


def build(sizes: Sizes, tau: float, attention: Any = None) -> hb.HAMLayer:
    """A layer with this threshold; the weights are the same every time."""
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


def calls_of_parts(layer: hb.HAMLayer, x: Tensor) -> dict[nn.Module, tuple[Any, Any, Tensor]]:
    """Arguments, keyword arguments and read of the memory and of attention, inside the layer."""
    calls: dict[nn.Module, tuple[Any, Any, Tensor]] = {}

    def keep(part: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls[part] = args, kwargs, result if isinstance(result, Tensor) else result[0]

    hooks = [
        part.register_forward_hook(keep, with_kwargs=True)
        for part in (layer.memory, layer.attention)
        if part is not None
    ]
    try:
        with torch.no_grad():
            layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def check_parts(layer: hb.HAMLayer, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    """Checks the memory and attention on the inputs that they get inside the layer."""
    calls = calls_of_parts(layer, x)
    checked = {"attention": check_attention(layer.attention, *calls[layer.attention], cotangent)}
    if layer.memory is not None:
        checked["memory"] = check_memory(layer.memory, *calls[layer.memory])
    return checked


def check_memory(memory: Any, args: Any, kwargs: Any, read: Tensor) -> dict[str, Any]:
    """Compares the memory's read with an implementation in plain torch."""
    impl, trusted = memory.impl, "chunked" if read.is_cuda else "reference"
    memory.impl = trusted
    try:
        with torch.no_grad():
            exact, _, _ = memory(*args, **kwargs)
    finally:
        memory.impl = impl
    most = MAX_GRADIENT_ERROR * (FLOAT32 if read.dtype == torch.float32 else 1.0)
    return within(trusted, {"read": error(read, exact)}, {"read": most})


def check_attention(
    part: Any, args: Any, _kwargs: Any, _read: Tensor, cotangent: Tensor
) -> dict[str, Any]:
    """Compares attention with dense attention of a sample of queries, with gradients."""
    q, keys = args
    dense = keys.dense()
    if isinstance(part, FlashAttention):
        attend = sdpa(SDPBackend.FLASH_ATTENTION)
    else:
        attend = selected(dense.evict_at, part.impl)
    evict_at = dense.evict_at.expand(*dense.k.shape[:3])
    return SampledAttention(q, dense.k, dense.v, evict_at, cotangent).check(attend, learns=True)


def check_compiled(compiled: Any, layer: hb.HAMLayer, x: Tensor) -> dict[str, Any]:
    """Compares with the layer itself.

    x requires a gradient, so that the code that is compiled here is the code that is timed.
    """
    x = x.detach().requires_grad_()
    exact, got = layer(x), compiled(x)
    moved = float((got.stats.evict_at != exact.stats.evict_at).float().mean())
    allowed = {"y": MAX_COMPILED_ERROR}
    checked = within("the layer, not compiled", {"y": error(got.y, exact.y)}, allowed)
    return checked | {"decisions that differ": moved}


def median_score(layer: hb.HAMLayer, x: Tensor) -> float:
    """The threshold that half of the tokens reach: between two scores, so that none is on it."""
    with torch.no_grad():
        return float(layer(x).stats.score.float().quantile(0.5))


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of three layers, eager and compiled, forward and backward."""
    x, y = (
        torch.randn(1, tokens, sizes.hidden, device=sizes.device, dtype=sizes.dtype)
        for _ in range(2)
    )
    reads = torch.randn(
        1, tokens, sizes.heads, sizes.head_dim, device=sizes.device, dtype=sizes.dtype
    )
    everything = build(sizes, STORE_EVERYTHING)
    tau = median_score(everything, x)
    layers = {"selected": build(sizes, tau), "everything": everything}
    with torch.no_grad():
        evict_at = layers["selected"](x).stats.evict_at.expand(1, tokens, sizes.heads)
    layers["everything by FlashAttention"] = build(sizes, STORE_EVERYTHING, FlashAttention())
    seen_by_all = sizes.heads * floors.causal_pairs(tokens), sizes.heads * tokens

    def contender(case: str, mode: str) -> Contender:
        layer, run = layers[case], layers[case]
        if mode == "compiled":
            run = torch.compile(layer, fullgraph=True, backend=sizes.backend, dynamic=False)

        def call() -> object:
            given = x.detach().requires_grad_()
            return torch.autograd.grad(run(given).y, [given, *layer.parameters()], y)

        def check() -> dict[str, Any]:
            if mode == "eager":
                return check_parts(layer, x, reads)
            return check_compiled(run, layer, x)

        selects = case == "selected"
        pairs, kept = seen(evict_at) if selects else seen_by_all
        size = tokens, sizes.hidden, sizes.heads, sizes.head_dim
        work = floors.layer(*size, pairs=pairs, kept=kept, item=x.element_size())
        names = {"case": case, "mode": mode, "kept": kept / seen_by_all[1]}
        estimate = clock.chip and estimates.layer(
            clock.chip,
            *size,
            attends=CASES[case],
            evict_at=evict_at if selects else torch.full_like(evict_at, NEVER),
            item=x.element_size(),
            mode=mode,
        )
        names |= {"tau": tau} if selects else {}
        return Contender(names, call, check, work, estimate)

    # compilations of other lengths count against torch's limit of recompilations
    torch.compiler.reset()
    contenders = [contender(case, mode) for mode in ("eager", "compiled") for case in layers]
    common = {"part": "layer", "tokens": tokens, "pass": TRAINING}
    yield from race(contenders, clock, ceilings, common)
