"""Attention over the stored tokens: query/key norm, rotary positions, and the op."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from hamblocks.convolution import ShortConvolution, check_options
from hamblocks.heads import Split, under
from hamblocks.keys import Keys
from hamblocks.norm import RMSNorm
from hamblocks.null_sink import attend_with_null
from hamblocks.own_weights import is_plain
from hamblocks.protocols import Built, LayerDims, NewTokens, check_count
from hamblocks.rope import angles, check_scaling, check_theta, pair_frequencies, turned
from hamblocks_ops import decode
from hamblocks_ops.arguments import wrong


@final
class SelectedAttention(Built):
    """Softmax attention over the stored tokens.

    Keys go through a short causal convolution (values too with `conv_values`), are normalised and
    rotated by their position in the sequence, and are then stored. With the convolution the key of
    a token also depends on the token before it, so a query can find a token by its predecessor.
    Without it a single layer does not learn associative recall (see the page on the routing study).
    """

    prepares_when_called = True
    """See `hamblocks.protocols.PreparesWhenCalled`."""

    def __init__(
        self,
        *,
        conv_size: int = 2,
        conv_init: str = "uniform",
        conv_values: bool = False,
        rope_theta: float | None = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        null_sink: bool = False,
        impl: str = "auto",
    ) -> None:
        """Stores the arguments; parameters are made when a layer takes the part.

        Args:
            conv_size: taps of a causal depthwise convolution over the keys, without an activation.
                The part then has a state, the last `conv_size - 1` inputs of the convolution. 1: no
                convolution and no state.
            conv_init: initial weights, "uniform" or "identity"; with "identity" the part initially
                computes the same as one without a convolution (see `ShortConvolution`).
            conv_values: whether the values are convolved too.
            rope_theta: base of the rotary wavelengths; None: no rotary positions.
            rope_scaling: how the rotary frequencies are scaled: a dict as in transformers, with
                "linear", "dynamic", "llama3" or "yarn" as `rope_type` and the numbers that this
                type needs (`hamblocks.rope`). With "dynamic" a token's frequencies depend on the
                number of tokens up to it. None: they are not scaled.
            partial_rotary_factor: fraction of a head's channels that are rotated, counted from the
                first, in (0, 1].
            qk_norm: RMSNorm of queries and keys, per head.
            norm_eps: epsilon of these norms.
            null_sink: one more key per key/value head, with a learned logit and the value 0, so
                that a query can read nothing (HOLA, arXiv 2607.02303). It scales the read of a
                query, and a norm on reads cancels that: use `GatedSum(read_norm=False)`.
            impl: implementation of attention (see `hamblocks.keys.Keys.attend`).

        Raises:
            ValueError: `conv_size` is not an integer of at least 1, values are to be convolved with
                one tap, `rope_theta` is not a finite number above 0, `rope_scaling` is unknown or
                has no rotary positions to scale, or `partial_rotary_factor` is out of range.
        """
        super().__init__()
        conv_size = check_count("conv_size", conv_size, 1)
        if conv_values and conv_size == 1:
            raise wrong("conv_values", "False, or conv_size >= 2", "True with conv_size = 1")
        check_options(conv_init, None, "conv_")
        rope_scaling = check_scaling(rope_scaling)
        if rope_scaling is not None and rope_theta is None:
            raise wrong("rope_scaling", "None where rope_theta = None", repr(rope_scaling))
        if not 0 < partial_rotary_factor <= 1:
            raise wrong("partial_rotary_factor", "a number in (0, 1]", repr(partial_rotary_factor))
        self.partial_rotary_factor = partial_rotary_factor
        self.conv_size, self.conv_init, self.conv_values = conv_size, conv_init, conv_values
        self.rope_theta = check_theta(rope_theta)
        self.rope_scaling = rope_scaling
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        self.null_sink, self.impl = null_sink, impl

    def make(self, dims: LayerDims) -> None:
        """Makes norms, convolution and null logits.

        Raises:
            ValueError: the number of rotated channels, `int(head_dim * partial_rotary_factor)`, is
                odd or 0, or below 4 with `rope_scaling`; or there is no such `conv_init`.
        """
        self.rotated = int(dims.head_dim * self.partial_rotary_factor)
        name = "head_dim" if self.partial_rotary_factor == 1 else "head_dim * partial_rotary_factor"
        if self.rope_theta is not None and (self.rotated % 2 or not self.rotated):
            raise wrong(name, "an even number for rotary positions", f"{self.rotated}")
        if self.rope_scaling is not None and self.rotated < 4:
            raise wrong(name, "at least 4 for rope_scaling", f"{self.rotated}")
        if self.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(dims.head_dim, eps=self.norm_eps) for _ in range(2))
        if self.null_sink:
            self.null = nn.Parameter(torch.zeros(dims.num_kv_heads))
        if self.conv_size > 1:
            channels = (1 + self.conv_values) * dims.num_kv_heads * dims.head_dim
            self.conv = ShortConvolution(channels, self.conv_size, None, self.conv_init)

    def split_heads(self, ranks: int) -> dict[str, Split]:
        """See `hamblocks.heads.SplitsHeads`."""
        assert self.dims is not None
        heads, splits = self.dims.num_kv_heads, {}
        if self.null_sink:
            splits["null"] = Split(0, [heads])
        if self.conv_size > 1:
            blocks = [heads * self.dims.head_dim] * (1 + self.conv_values)
            splits |= under("conv", self.conv.split_blocks(blocks, ranks))
        return splits

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
        if q.device.type in decode.DEVICES:
            decoded = self._decoded(q, k, v, position, state, cu_seqlens)
            if decoded is not None:
                return decoded
        after = None
        if self.conv_size > 1:
            k, v, after = self._convolved(k, v, state, cu_seqlens)
        if self.qk_norm:
            dtype = q.dtype
            q = self.q_norm(q).to(dtype)
            k = self.k_norm(k).to(dtype)
        if self.rope_theta is not None:
            size, theta, scaling = self.rotated, self.rope_theta, self.rope_scaling
            if size == q.shape[3]:
                turn = angles(q, position, theta, scaling)
                q, k = turned(q, *turn), turned(k, *turn)
            else:
                turn = angles(q[..., :size], position, theta, scaling)
                q, k = (
                    torch.cat([turned(x[..., :size], *turn), x[..., size:]], -1) for x in (q, k)
                )
        return q, k, v, after

    def _decoded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        past: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """What `prepare` returns for one token, by one kernel; None where it cannot run."""
        convolves = self.conv_size > 1
        modules = [self.q_norm, self.k_norm] if self.qk_norm else []
        weights: list[Tensor | None] = [norm.weight for norm in modules]
        if q.shape[1] != 1 or cu_seqlens is not None or (convolves and past is None):
            return None
        if convolves:
            weights += [self.conv.weight, past]
        if not decode.runs(q, k, v, *weights) or not is_plain(
            *modules, *([self.conv] if convolves else [])
        ):
            return None
        rotation = None
        if self.rope_theta is not None:
            of = q[..., : self.rotated]
            found = pair_frequencies(of, position, self.rope_theta, self.rope_scaling)
            if found is None:
                return None
            rotation = decode.Rotation(position, *found)
        norm: dict[str, Any] = {"eps": self.norm_eps, "turns": rotation is not None}
        of_q, of_k = weights[:2] if self.qk_norm else (None, None)
        parts = [
            decode.Heads(q, weight=of_q, **norm),
            decode.Heads(k, weight=of_k, channel=0 if convolves else None, **norm),
        ]
        if self.conv_values:
            parts.append(decode.Heads(v, channel=k.shape[2] * k.shape[3]))
        conv = None if past is None else decode.Convolution(self.conv.weight, past)
        (q, k, *values), after = decode.heads(parts, conv, rotation)
        return q, k, values[0] if values else v, after

    @property
    def border_size(self) -> int:
        """See `hamblocks.slices.HasBorder`."""
        return self.conv_size - 1

    def border_inputs(self, k: Tensor, v: Tensor) -> Tensor:
        """Inputs of the convolution, `[B, T, channels]`."""
        return (torch.cat([k, v], 2) if self.conv_values else k).flatten(2)

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
        x = self.border_inputs(k, v) if self.conv_values else k.flatten(2)
        mixed, after = self.conv(x, past, cu_seqlens)
        mixed = mixed.unflatten(2, (-1, k.shape[3])).to(dtype)
        if self.conv_values:
            k, v = mixed.chunk(2, 2)
            return k, v, after
        return mixed, v, after

    def forward(self, q: Tensor, keys: Keys | NewTokens) -> Any:
        """See `hamblocks.protocols.Attention`, and for `NewTokens` `PreparesWhenCalled`."""
        if isinstance(keys, NewTokens):
            return keys.prepared_by(self, q)
        if self.null_sink:
            return attend_with_null(q, keys, self.null, impl=self.impl)
        return keys.attend(q, impl=self.impl).out
