"""Selected attention at several keep fractions, causal attention over everything, and flex.

At the shortest length also grouped queries, half the head size, a packed batch, and the lifetimes
that `Window` and `TopK` give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hamblocks.ops import explain, select_topk, select_window, selected_attention
from hamblocks_ops.packing import NEVER
from measuring import estimates, floors
from measuring.checks import SampledAttention
from measuring.clock import Clock, Contender, NotHereError, race
from measuring.sizes import Sizes
from measuring.targets import DENSE, FORWARD, TRAINING
from measuring.visits import seen

KEEP_FRACTIONS = (0.5, 0.25, 0.1)
GPU_IMPLS = ("triton", "flex-compact", "flex")
VARIANTS = ("grouped queries", "half the head size", "packed", "Window", "TopK")
VARIANT_IMPLS = ("triton", "flex-compact")
VARIANT_FRACTION = 0.25
"""Tokens that a variant stores, at random where it does not say otherwise."""
GROUP = 4
"""Query heads for each key head with grouped queries."""
PACKED = 4
"""Sequences of a packed batch, of lengths that differ."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Candidate(NamedTuple):
    """One way to attend, and the lifetimes that it attends with.

    Attributes:
        names: its case, and its keep fraction where it selects.
        evict_at: int32 `[1, T, Hkv]`, counted over the whole batch row.
        attend: q `[1, T, H, D]`, k, v `[1, T, Hkv, D]` -> out `[1, T, H, D]`.
        until: int32 `[1, T, 1]`, the end of the sequence of each token of a packed batch.
    """

    names: dict[str, Any]
    evict_at: Tensor
    attend: Attend
    until: Tensor | None = None


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
            grouped = q.shape[2] != k.shape[2]
            out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
            return out.transpose(1, 2)

    return attend


def flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over everything by FlashAttention-3, if it is installed."""
    if not q.is_cuda:
        raise NotHereError("FlashAttention-3 needs a GPU")
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some releases return lse too


def selected(evict_at: Tensor, impl: str, cu_seqlens: Tensor | None = None) -> Attend:
    """Selected attention by one implementation of ours."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if impl in GPU_IMPLS and not q.is_cuda:
            raise NotHereError(f"{impl} is for a GPU")
        return selected_attention(q, k, v, evict_at, cu_seqlens=cu_seqlens, impl=impl).out

    return attend


def scattered(fraction: float, tokens: int, heads: int, device: str) -> Tensor:
    """Random lifetimes: each head stores a token for good, with this probability, or never."""
    position = torch.arange(tokens, device=device, dtype=torch.int32)[None, :, None]
    keep = torch.rand(1, tokens, heads, device=device) < fraction
    return torch.where(keep, torch.full_like(position, NEVER), position)


def dense(evict_at: Tensor) -> list[Candidate]:
    """Causal attention over everything by the kernels that there are."""
    everything = torch.full_like(evict_at, NEVER)
    kernels = sdpa(SDPBackend.FLASH_ATTENTION), sdpa(SDPBackend.CUDNN_ATTENTION), flash_3
    return [
        Candidate({"case": case}, everything, kernel)
        for case, kernel in zip(DENSE, kernels, strict=True)
    ]


def chosen(impls: tuple[str, ...], q: Tensor, k: Tensor, evict_at: Tensor) -> tuple[str, ...]:
    """On a CPU also what "auto" takes there; the GPU's report why they cannot run."""
    if q.is_cuda:
        return impls
    return (*impls, str(explain(selected_attention, q, k, k, evict_at).chosen))


def candidates(tokens: int, sizes: Sizes, q: Tensor) -> list[Candidate]:
    """Attention over everything by other kernels, and selected attention at every fraction."""
    lifetimes = {f: scattered(f, tokens, sizes.heads, sizes.device) for f in KEEP_FRACTIONS}
    found = dense(lifetimes[KEEP_FRACTIONS[0]])
    for fraction, evict_at in lifetimes.items():
        for impl in chosen(GPU_IMPLS, q, q, evict_at):
            names = {"case": impl, "fraction": fraction}
            found.append(Candidate(names, evict_at, selected(evict_at, impl)))
    return found


def variant_candidates(variant: str, q: Tensor, k: Tensor) -> list[Candidate]:
    """The dense kernels, and ours with the lifetimes of the variant.

    In a packed batch the dense kernels have no part, and ours also store everything.
    """
    tokens, heads = k.shape[1:3]
    evict_at = scattered(VARIANT_FRACTION, tokens, heads, str(k.device))
    score, kept = torch.rand(1, tokens, heads, device=k.device), int(VARIANT_FRACTION * tokens)
    if variant == "packed":
        return packed_candidates(evict_at, q, k)
    if variant == "Window":
        evict_at = select_window(score, kept)
    if variant == "TopK":
        evict_at = select_topk(score, kept)
    return dense(evict_at) + [
        Candidate({"case": impl}, evict_at, selected(evict_at, impl))
        for impl in chosen(VARIANT_IMPLS, q, k, evict_at)
    ]


def packed_candidates(evict_at: Tensor, q: Tensor, k: Tensor) -> list[Candidate]:
    """Ours over sequences of 1, 2, 3 and 4 tenths of the tokens, some stored and all stored."""
    tokens = k.shape[1]
    shares = torch.arange(1, PACKED + 1).cumsum(0) * tokens // (PACKED * (PACKED + 1) // 2)
    borders = torch.tensor([0, *shares.tolist()], dtype=torch.int32, device=k.device)
    ends = borders[1:].repeat_interleave(borders.diff())[None, :, None]
    position = torch.arange(tokens, dtype=torch.int32, device=k.device)[None, :, None]
    begins = borders[:-1].repeat_interleave(borders.diff())[None, :, None]
    found = []
    for fraction, whole in ((VARIANT_FRACTION, evict_at), (1.0, torch.full_like(evict_at, NEVER))):
        stored = whole > position
        own = torch.where(stored, torch.full_like(whole, NEVER), position - begins)
        seen_until = torch.where(stored, ends, position)
        for impl in chosen(VARIANT_IMPLS, q, k, own):
            names = {"case": impl, "fraction": fraction}
            found.append(Candidate(names, seen_until, selected(own, impl, borders), ends))
    return found


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of every candidate, forward alone and forward with backward."""
    draw = functools.partial(torch.randn, device=sizes.device, dtype=sizes.dtype)
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (draw(shape) for _ in range(4))
    common = {"part": "attention", "tokens": tokens}
    inputs = q, k, v, cotangent
    yield from compared(candidates(tokens, sizes, q), inputs, clock, ceilings, common)
    if tokens > min(sizes.op_tokens):
        return
    for variant in VARIANTS:
        heads = sizes.heads // GROUP if variant == "grouped queries" else sizes.heads
        dim = sizes.head_dim // 2 if variant == "half the head size" else sizes.head_dim
        q, cotangent = (draw(1, tokens, sizes.heads, dim) for _ in range(2))
        k, v = (draw(1, tokens, heads, dim) for _ in range(2))
        ways, inputs = variant_candidates(variant, q, k), (q, k, v, cotangent)
        yield from compared(ways, inputs, clock, ceilings, common | {"variant": variant})


def compared(
    ways: list[Candidate],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    clock: Clock,
    ceilings: floors.Ceilings,
    common: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Measurements of candidates that take turns on the same q, k, v and gradient of out."""
    q, k, v, cotangent = inputs
    # the same lifetimes serve several candidates: what is exact is computed once for each
    exact = functools.cache(
        lambda which: SampledAttention(
            q, k, v, next(one.evict_at for one in ways if id(one.evict_at) == which), cotangent
        )
    )

    def contender(one: Candidate, learns: bool) -> Contender:
        def call() -> object:
            given = [x.detach().requires_grad_(learns) for x in (q, k, v)]
            with torch.set_grad_enabled(learns):
                out = one.attend(*given)
            return torch.autograd.grad(out, given, cotangent) if learns else out

        group = q.shape[2] // k.shape[2]
        pairs, kept = seen(one.evict_at)
        work = floors.attention(
            *q.shape[1:],
            pairs=group * pairs,
            kept=kept,
            item=q.element_size(),
            learns=learns,
        )
        names = {**one.names, "kept": kept / one.evict_at.numel()}
        estimate = clock.chip and estimates.of_case(
            one.names["case"],
            clock.chip,
            one.evict_at,
            *q.shape[2:],
            item=q.element_size(),
            learns=learns,
            until=one.until,
        )
        return Contender(
            names,
            call,
            lambda: exact(id(one.evict_at)).check(one.attend, learns),
            work,
            estimate,
        )

    for which in (FORWARD, TRAINING):
        contenders = [contender(one, which == TRAINING) for one in ways]
        yield from race(contenders, clock, ceilings, common | {"pass": which})
