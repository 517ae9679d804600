"""Combiners, which join the read of the memory and the read of attention."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.norm import normalised
from hamblocks.protocols import Built, LayerDims


class _Mix(Built):
    """Normalises each read per head, weights it per head by a gate on x, and projects the sum.

    A layer with only one read has one norm and one gate.
    """

    def make(self, dims: LayerDims) -> None:
        if dims.has_memory:
            self.memory_norm = nn.RMSNorm(dims.head_dim, eps=1e-6)
        if dims.has_attention:
            self.attention_norm = nn.RMSNorm(dims.head_dim, eps=1e-6)
        self.reads = dims.has_memory + dims.has_attention
        self.gate_proj = nn.Linear(dims.hidden_size, self.reads * dims.num_heads)
        self.o_proj = nn.Linear(dims.num_heads * dims.head_dim, dims.hidden_size, bias=False)

    def weights(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, T, H, reads]` -> the weight of each read, memory first."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        """See `hamblocks.protocols.Combiner`."""
        reads = []
        if memory_read is not None:
            reads.append(normalised(memory_read, self.memory_norm))
        if attention_read is not None:
            reads.append(normalised(attention_read, self.attention_norm))
        logits = self.gate_proj(x).unflatten(-1, (-1, self.reads))
        weights = self.weights(logits).to(x.dtype)
        # slices instead of unbind: inductor in torch 2.13 computes wrong gradients of unbind here
        mixed = weights[..., :1] * reads[0]
        if len(reads) == 2:
            mixed = mixed + weights[..., 1:] * reads[1]
        y: Tensor = self.o_proj(mixed.to(x.dtype).flatten(2))
        return y


@final
class GatedSum(_Mix):
    """Joins the reads with one sigmoid gate each; the gates are independent."""

    def weights(self, logits: Tensor) -> Tensor:
        """Sigmoid: each weight is in (0, 1)."""
        return logits.sigmoid()


@final
class SoftmaxMix(_Mix):
    """Joins the reads with gates that sum to one."""

    def weights(self, logits: Tensor) -> Tensor:
        """A softmax over the reads."""
        return torch.softmax(logits, -1)
