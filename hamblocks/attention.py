"""Attention over the stored tokens: query/key norm, rotary positions, and the op."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.convolution import ShortConvolution
from hamblocks.keys import Keys
from hamblocks.norm import RMSNorm
from hamblocks.null_sink import attend_with_null
from hamblocks.protocols import Built, LayerDims, check_count
from hamblocks_ops.arguments import wrong
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

    Keys go through a short causal convolution (values too if asked), are normalised and rotated by
    their position in the sequence, and are then stored. With the convolution the key of a token
    knows the token before it: a value that follows its key is then found by that key. Without it
    one layer does not learn recall (see the page on the routing study).
    """

    def __init__(
        self,
        *,
        conv_size: int = 2,
        conv_init: str = "uniform",
        conv_values: bool = False,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = True,
        null_sink: bool = False,
        impl: str = "auto",
    ) -> None:
        """Makes the part.

        Args:
            conv_size: taps of a causal depthwise convolution over the keys, without an activation.
                The part has a state, the last `conv_size - 1` tokens. 1: no convolution and no
                state.
            conv_init: "uniform", or "identity": the part starts as one without a convolution (see
                `ShortConvolution`).
            conv_values: whether the values are convolved too.
            rope_theta: base of the rotary wavelengths; None: no rotary positions.
            qk_norm: RMSNorm of queries and keys, per head.
            null_sink: one more key per key/value head, with a learned logit and the value 0: a
                query may read nothing (HOLA, arXiv 2607.02303). It scales the read of a query, which
                a combiner that normalises reads takes back: use `GatedSum(read_norm=False)`.
            impl: implementation of attention (see `hamblocks.keys.Keys.attend`).

        Raises:
            ValueError: `conv_size` is not an integer of at least 1, or values are to be convolved
                with one tap.
        """
        super().__init__()
        check_count("conv_size", conv_size, 1)
        if conv_values and conv_size == 1:
            raise wrong("conv_values", "False, or conv_size >= 2", "True with conv_size = 1")
        self.conv_size, self.conv_init, self.conv_values = conv_size, conv_init, conv_values
        self.rope_theta, self.qk_norm = rope_theta, qk_norm
        self.null_sink, self.impl = null_sink, impl

    def make(self, dims: LayerDims) -> None:
        """Makes norms, convolution and null logits.

        Raises:
            ValueError: rotary positions need an even head_dim.
        """
        if self.rope_theta is not None and dims.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number for rotary positions, got {dims.head_dim}"
            )
        if self.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(dims.head_dim, eps=1e-6) for _ in range(2))
        if self.null_sink:
            self.null = nn.Parameter(torch.zeros(dims.num_kv_heads))
        if self.conv_size > 1:
            channels = (1 + self.conv_values) * dims.num_kv_heads * dims.head_dim
            self.conv = ShortConvolution(channels, self.conv_size, None, self.conv_init)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `hamblocks.protocols.PreparesTokens`.

        The state is `[N, conv_size - 1, channels]`, the last inputs of the convolution, oldest
        first; None without a convolution.

        Raises:
            ValueError: `state` is not the state of such a part.
        """
        after = None
        if self.conv_size > 1:
            k, v, after = self._convolved(k, v, state, cu_seqlens)
        if self.qk_norm:
            dtype = q.dtype
            q = self.q_norm(q).to(dtype)
            k = self.k_norm(k).to(dtype)
        if self.rope_theta is not None:
            turn = _angles(q, position, self.rope_theta)
            q, k = _turned(q, *turn), _turned(k, *turn)
        return q, k, v, after

    def _convolved(
        self, k: Tensor, v: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, and values if asked, after the convolution; and its state."""
        if past is not None:
            sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            sizes = (sequences, self.conv_size - 1, self.conv.hidden_size)
            if not isinstance(past, Tensor) or past.shape != sizes or past.device != k.device:
                raise wrong("state.attention", f"a tensor {list(sizes)} on {k.device}", past)
        dtype = k.dtype
        x = torch.cat([k, v], 2) if self.conv_values else k
        mixed, after = self.conv(x.flatten(2), past, cu_seqlens)
        mixed = mixed.unflatten(2, x.shape[2:]).to(dtype)
        if self.conv_values:
            k, v = mixed.chunk(2, 2)
            return k, v, after
        return mixed, v, after

    def forward(self, q: Tensor, keys: Keys) -> Tensor:
        """See `hamblocks.protocols.Attention`."""
        if self.null_sink:
            return attend_with_null(q, keys, self.null, impl=self.impl)
        return keys.attend(q, impl=self.impl).out
