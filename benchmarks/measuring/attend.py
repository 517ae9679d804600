"""Selected attention at several keep fractions, against causal attention over everything and against flex."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hamblocks.ops import explain, selected_attention
from hamblocks_ops.packing import NEVER
from measuring import floors
from measuring.checks import SampledAttention
from measuring.clock import Clock, Contender, NotHereError, race
from measuring.sizes import Sizes
from measuring.targets import FORWARD, TRAINING

FRACTIONS = (0.5, 0.25, 0.1)
KERNELS = ("triton", "flex")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def shapes(sizes: Sizes) -> tuple[int, ...]:
    return sizes.op_tokens


def sdpa(backend: SDPBackend) -> Attend:
    """Causal attention over everything by one of torch's kernels, `[B, T, H, D]`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise NotHereError(f"{backend.name} needs a GPU")
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3, where it is installed."""
    if not q.is_cuda:
        raise NotHereError("FlashAttention-3 needs a GPU")
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some releases return lse too


def selected(evict_at: Tensor, impl: str) -> Attend:
    """By one implementation of ours."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if impl in KERNELS and not q.is_cuda:
            raise NotHereError(f"{impl} is for a GPU")
        return selected_attention(q, k, v, evict_at, impl=impl).out

    return attend


def scattered(fraction: float, tokens: int, heads: int, device: str) -> Tensor:
    """Lifetimes of tokens that each head stores for good, or never, at random."""
    position = torch.arange(tokens, device=device, dtype=torch.int32)[None, :, None]
    keep = torch.rand(1, tokens, heads, device=device) < fraction
    return torch.where(keep, torch.full_like(position, NEVER), position)


def seen(evict_at: Tensor) -> tuple[int, int]:
    """(query, key, head) that see each other, and (key, head) that are stored, in self-attention."""
    tokens = evict_at.shape[1]
    position = torch.arange(tokens, device=evict_at.device)[None, :, None]
    lifetimes = (evict_at.long().clamp(max=tokens) - position).clamp(min=0)
    return int(lifetimes.sum()), int((lifetimes > 0).sum())


def rows(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(4)
    )
    lifetimes = {f: scattered(f, tokens, sizes.heads, sizes.device) for f in FRACTIONS}
    everything = torch.full_like(lifetimes[FRACTIONS[0]], NEVER)
    impls = (
        KERNELS
        if sizes.gpu
        else (*KERNELS, explain(selected_attention, q, k, v, everything).chosen)
    )
    compared: list[tuple[dict[str, Any], Tensor, Attend]] = [
        ({"case": "flash"}, everything, sdpa(SDPBackend.FLASH_ATTENTION)),
        ({"case": "cudnn"}, everything, sdpa(SDPBackend.CUDNN_ATTENTION)),
        ({"case": "flash-3"}, everything, flash_3),
    ]
    for fraction, evict_at in lifetimes.items():
        compared += [
            ({"case": i, "fraction": fraction}, evict_at, selected(evict_at, i)) for i in impls
        ]
    exact = {
        id(x): SampledAttention(q, k, v, x, cotangent) for x in (everything, *lifetimes.values())
    }
    for which in (FORWARD, TRAINING):
        learns = which == TRAINING

        def contender(
            row: dict[str, Any], evict_at: Tensor, attend: Attend, learns: bool = learns
        ) -> Contender:
            def call() -> object:
                given = [x.detach().requires_grad_(learns) for x in (q, k, v)]
                with torch.set_grad_enabled(learns):
                    out = attend(*given)
                return torch.autograd.grad(out, given, cotangent) if learns else out

            pairs, kept = seen(evict_at)
            work = floors.attention(
                *shape[1:], pairs=pairs, kept=kept, item=q.element_size(), learns=learns
            )
            row = {**row, "kept": kept / (tokens * sizes.heads)}
            return Contender(row, call, lambda: exact[id(evict_at)].check(attend, learns), work)

        contenders = [contender(*given) for given in compared]
        yield from race(
            contenders, clock, ceilings, {"part": "attention", "tokens": tokens, "pass": which}
        )
