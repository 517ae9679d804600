"""What an implementation of `selected_attention` is given, and what is made of its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.dispatch import without_triton

MAX_TILE_DIM = 256
"""Largest head size of the Triton kernels: a tile holds whole heads."""


class AttentionOutput(NamedTuple):
    """Result of `selected_attention` and `paged_attention`.

    Attributes:
        out: `[B, Tq, H, D]`, dtype of q.
        lse: `[B, Tq, H]`, float32 (float64 for float64 inputs): natural log of the sum of the
            exponentiated logits, -inf where a query sees nothing. It carries no gradient.
    """

    out: Tensor
    lse: Tensor


class AttentionCall(NamedTuple):
    """One call of `selected_attention`.

    The fields are in the order of the arguments of the registered operators. Positions and
    lifetimes are int32. `evict_at`, `logit_bias` and `key_position` are expanded to
    `[B, Tk, Hkv]`. What `key_lengths` or a bias of -inf hides has evict_at = key_position, so it is
    never stored.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None
    query_position: Tensor
    key_position: Tensor
    cu_seqlens: Tensor | None
    scale: float


def learns(call: AttentionCall) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.logit_bias)
    )


def empty_grads(
    q: Tensor, k: Tensor, v: Tensor, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of q, k, v and the bias, contiguous; without a bias its is empty."""
    bias = q.new_empty(0) if logit_bias is None else logit_bias.new_empty(logit_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def without_tiles(q: Tensor) -> str | None:
    """Why the Triton tiles of attention cannot compute with such queries, or None when they can."""
    if q.dtype == torch.float64:
        return "it computes in float32 at the most"
    if q.shape[3] > MAX_TILE_DIM:
        return f"a tile holds head sizes up to {MAX_TILE_DIM}, not {q.shape[3]}"
    return without_triton(q)


def rounded(q: Tensor, result: tuple[Tensor, Tensor]) -> AttentionOutput:
    """Out in the dtype of q, lse as it is."""
    out, lse = result
    return AttentionOutput(out.to(q.dtype), lse)
