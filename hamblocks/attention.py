"""Attention over the stored tokens: query/key norm, rotary positions, and the op."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.cache import KVCache
from hamblocks.protocols import Built, LayerDims
from hamblocks_ops import paged_attention, selected_attention
from hamblocks_ops.precision import wide

FEW = 8
"""Up to so many new tokens per sequence, the stored ones are read where they lie; for more, as padded copies."""


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves rotated against each other as in transformers.

    Args:
        x: `[B, T, H, D]`, D even.
        position: int `[B, T]`, or `[1, T]`.
        theta: base of the wavelengths.

    Returns:
        The shape and dtype of x; angles are computed in float32 (float64 for float64).
    """
    dtype = wide(x)
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position.to(dtype)[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@final
class SelectedAttention(Built):
    """Softmax attention over what the selector stored, at original positions; the cache stores rotated keys."""

    def __init__(
        self, *, rope_theta: float | None = 10_000.0, qk_norm: bool = True, impl: str = "auto"
    ) -> None:
        """Makes the part.

        Args:
            rope_theta: base of the rotary wavelengths; None: no positions.
            qk_norm: RMSNorm of queries and keys, per head.
            impl: implementation of `selected_attention`.
        """
        super().__init__()
        self.rope_theta, self.qk_norm, self.impl = rope_theta, qk_norm, impl

    def make(self, dims: LayerDims) -> None:
        """Makes the two norms.

        Raises:
            ValueError: rotary positions need an even head_dim.
        """
        if self.rope_theta is not None and dims.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number for rotary positions, got {dims.head_dim}"
            )
        if self.qk_norm:
            self.q_norm, self.k_norm = (
                nn.RMSNorm(dims.head_dim, eps=1e-6),
                nn.RMSNorm(dims.head_dim, eps=1e-6),
            )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        evict_at: Tensor,
        *,
        position: Tensor,
        logit_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """See `hamblocks.protocols.Attention`. With a cache, `position` -1 marks padding in ragged pieces."""
        dtype = q.dtype
        if self.qk_norm:
            # under autocast the weights are wider than q and k
            q, k = (
                norm(x.to(norm.weight.dtype)).to(dtype)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        if self.rope_theta is not None:
            q, k = (rotate(x, position, self.rope_theta) for x in (q, k))
        if cache is None:
            result = selected_attention(
                q, k, v, evict_at, logit_bias=logit_bias, cu_seqlens=cu_seqlens, impl=self.impl
            )
            return result.out, None
        cache = cache.append(k, v, position, evict_at, logit_bias)
        learns = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, logit_bias)
        )
        if (
            q.shape[1] <= FEW
            and not learns
            and cache.in_place
            and self.impl in ("auto", "reference")
        ):
            read = paged_attention(
                q,
                cache.slabs,
                cache.block_table,
                query_position=position,
                shared=False if cache.private else None,
                impl=self.impl,
            )
            return read.out, cache
        stored = cache.read()
        result = selected_attention(
            q,
            stored.k,
            stored.v,
            stored.evict_at,
            logit_bias=stored.logit_bias,
            query_position=position,
            key_position=stored.position,
            impl=self.impl,
        )
        return result.out, cache
