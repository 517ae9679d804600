"""Attention over the stored tokens: query/key norm, rotary positions, and the op."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.keys import Keys
from hamblocks.norm import normalised
from hamblocks.protocols import Built, LayerDims
from hamblocks_ops.precision import wide


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), with `rotate_half` of transformers.

    Args:
        x: `[B, T, H, D]`, D even.
        position: int `[B, T]`, or `[1, T]`.
        theta: base of the wavelengths.

    Returns:
        Shape and dtype as x. Angles are computed in float32, or float64 for float64 x.
    """
    return _turned(x, *_angles(x, position, theta))


def _angles(x: Tensor, position: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, `[B, T, 1, D // 2]`."""
    dtype, half = wide(x), x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position.to(dtype)[..., None] * frequency)[:, :, None]
    return angle.cos(), angle.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


@final
class SelectedAttention(Built):
    """Softmax attention over the stored tokens.

    Keys are normalised and rotated by their position in the sequence before they are stored.
    """

    def __init__(
        self, *, rope_theta: float | None = 10_000.0, qk_norm: bool = True, impl: str = "auto"
    ) -> None:
        """Makes the part.

        Args:
            rope_theta: base of the rotary wavelengths; None: no rotary positions.
            qk_norm: RMSNorm of queries and keys, per head.
            impl: implementation of attention (see `hamblocks.keys.Keys.attend`).
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
            self.q_norm, self.k_norm = (nn.RMSNorm(dims.head_dim, eps=1e-6) for _ in range(2))

    def prepare(self, q: Tensor, k: Tensor, *, position: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises and rotates queries and keys (see `hamblocks.protocols.PreparesKeys`)."""
        if self.qk_norm:
            dtype = q.dtype
            q = normalised(q, self.q_norm).to(dtype)
            k = normalised(k, self.k_norm).to(dtype)
        if self.rope_theta is not None:
            turn = _angles(q, position, self.rope_theta)
            q, k = _turned(q, *turn), _turned(k, *turn)
        return q, k

    def forward(self, q: Tensor, keys: Keys) -> Tensor:
        """See `hamblocks.protocols.Attention`."""
        return keys.attend(q, impl=self.impl).out
