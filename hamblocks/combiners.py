"""Combiners: how the memory's read and attention's read become one."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.protocols import Built, LayerDims


class _Mix(Built):
    """Both reads normalised per head and weighted by a gate of x per head, summed, projected out."""

    def make(self, dims: LayerDims) -> None:
        self.memory_norm = nn.RMSNorm(dims.head_dim, eps=1e-6)
        self.attention_norm = nn.RMSNorm(dims.head_dim, eps=1e-6)
        self.gate_proj = nn.Linear(dims.hidden_size, 2 * dims.num_heads)
        self.o_proj = nn.Linear(dims.num_heads * dims.head_dim, dims.hidden_size, bias=False)

    def weights(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, T, H, 2]` -> weights of memory and attention."""
        raise NotImplementedError

    def forward(self, x: Tensor, memory_read: Tensor, attention_read: Tensor) -> Tensor:
        """See `hamblocks.protocols.Combiner`."""
        weights = self.weights(self.gate_proj(x).unflatten(-1, (-1, 2))).to(x.dtype)
        # under autocast the norms' weights are wider than the reads
        memory_read, attention_read = (
            norm(read.to(norm.weight.dtype))
            for norm, read in (
                (self.memory_norm, memory_read),
                (self.attention_norm, attention_read),
            )
        )
        mixed = weights[..., :1] * memory_read + weights[..., 1:] * attention_read
        y: Tensor = self.o_proj(mixed.to(x.dtype).flatten(2))
        return y


@final
class GatedSum(_Mix):
    """Two independent sigmoid gates."""

    def weights(self, logits: Tensor) -> Tensor:
        """Each in (0, 1)."""
        return logits.sigmoid()


@final
class SoftmaxMix(_Mix):
    """Two gates that sum to one."""

    def weights(self, logits: Tensor) -> Tensor:
        """A softmax over the two reads."""
        return torch.softmax(logits, -1)
