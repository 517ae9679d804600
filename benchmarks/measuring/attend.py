"""Selected attention at several keep fractions, causal attention over everything, and flex."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

KEEP_FRACTIONS = (0.5, 0.25, 0.1)
GPU_IMPLS = ("triton", "flex")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Candidate(NamedTuple):
    """One way to attend, and the lifetimes that it attends with.

    Attributes:
        names: its case, and its keep fraction where it selects.
        evict_at: int32 `[1, T, H]`.
        attend: q, k, v `[1, T, H, D]` -> out `[1, T, H, D]`.
    """

    names: dict[str, Any]
    evict_at: Tensor
    attend: Attend


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Sequence lengths that are measured."""
    return sizes.op_tokens


def sdpa(backend: SDPBackend) -> Attend:
    """Causal attention over everything by one of torch's kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            raise NotHereError(f"{backend.name} needs a GPU")
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over everything by FlashAttention-3, if it is installed."""
    if not q.is_cuda:
        raise NotHereError("FlashAttention-3 needs a GPU")
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some releases return lse too


def selected(evict_at: Tensor, impl: str) -> Attend:
    """Selected attention by one implementation of ours."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if impl in GPU_IMPLS and not q.is_cuda:
            raise NotHereError(f"{impl} is for a GPU")
        return selected_attention(q, k, v, evict_at, impl=impl).out

    return attend


def scattered(fraction: float, tokens: int, heads: int, device: str) -> Tensor:
    """Random lifetimes: each head stores a token for good, with this probability, or never."""
    position = torch.arange(tokens, device=device, dtype=torch.int32)[None, :, None]
    keep = torch.rand(1, tokens, heads, device=device) < fraction
    return torch.where(keep, torch.full_like(position, NEVER), position)


def seen(evict_at: Tensor) -> tuple[int, int]:
    """Numbers of (query, key, head) that see each other and of (key, head) that are stored."""
    tokens = evict_at.shape[1]
    position = torch.arange(tokens, device=evict_at.device)[None, :, None]
    lifetimes = (evict_at.long().clamp(max=tokens) - position).clamp(min=0)
    return int(lifetimes.sum()), int((lifetimes > 0).sum())


def candidates(tokens: int, sizes: Sizes, q: Tensor) -> list[Candidate]:
    """Attention over everything by other kernels, and selected attention at every fraction."""
    lifetimes = {f: scattered(f, tokens, sizes.heads, sizes.device) for f in KEEP_FRACTIONS}
    everything = torch.full_like(lifetimes[KEEP_FRACTIONS[0]], NEVER)
    impls = GPU_IMPLS
    if not sizes.gpu:  # the GPU's report why they cannot run
        impls = (*GPU_IMPLS, explain(selected_attention, q, q, q, everything).chosen)
    found = [
        Candidate({"case": "flash"}, everything, sdpa(SDPBackend.FLASH_ATTENTION)),
        Candidate({"case": "cudnn"}, everything, sdpa(SDPBackend.CUDNN_ATTENTION)),
        Candidate({"case": "flash-3"}, everything, flash_3),
    ]
    for fraction, evict_at in lifetimes.items():
        for impl in impls:
            names = {"case": impl, "fraction": fraction}
            found.append(Candidate(names, evict_at, selected(evict_at, impl)))
    return found


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of every candidate, forward alone and forward with backward."""
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype) for _ in range(4)
    )
    compared = candidates(tokens, sizes, q)
    # the same lifetimes serve several candidates: what is exact is computed once for each
    exact = {
        id(one.evict_at): SampledAttention(q, k, v, one.evict_at, cotangent)
        for one in {id(one.evict_at): one for one in compared}.values()
    }

    def contender(one: Candidate, learns: bool) -> Contender:
        def call() -> object:
            given = [x.detach().requires_grad_(learns) for x in (q, k, v)]
            with torch.set_grad_enabled(learns):
                out = one.attend(*given)
            return torch.autograd.grad(out, given, cotangent) if learns else out

        pairs, kept = seen(one.evict_at)
        work = floors.attention(
            *shape[1:], pairs=pairs, kept=kept, item=q.element_size(), learns=learns
        )
        names = {**one.names, "kept": kept / (tokens * sizes.heads)}
        return Contender(
            names, call, lambda: exact[id(one.evict_at)].check(one.attend, learns), work
        )

    for which in (FORWARD, TRAINING):
        contenders = [contender(one, which == TRAINING) for one in compared]
        common = {"part": "attention", "tokens": tokens, "pass": which}
        yield from race(contenders, clock, ceilings, common)
