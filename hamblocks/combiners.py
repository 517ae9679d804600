"""Combiners, which join the read of the memory and the read of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.norm import RMSNorm
from hamblocks.protocols import Built, LayerDims
from hamblocks_ops.arguments import wrong


class _Mix(Built):
    """Weights each read per head by a gate on x, and projects the sum; reads are normalised first.

    The norm is RMSNorm per head. It takes away what scales a whole read, such as the null sink of
    attention. A layer with only one read has one norm and one gate. Where the memory has sizes of its own,
    each read has a projection of its own, and the projections are added.
    """

    def __init__(self, output_gate: bool = False, read_norm: bool = True) -> None:
        """Makes the part; the layer that owns it makes the parameters.

        Args:
            output_gate: multiply what is projected by SiLU(g_proj(x)), channel by channel, as
                `fla.layers.GatedDeltaNet` does.
            read_norm: normalise each read per head; False: take it as it is.
        """
        super().__init__()
        self.output_gate, self.read_norm = output_gate, read_norm
        self.attention_read_norm, self.bias = read_norm, False

    def make(self, dims: LayerDims) -> None:
        sizes = []
        if dims.has_memory:
            sizes.append(dims.memory_read)
            if self.read_norm:
                self.memory_norm = RMSNorm(dims.memory_read[1], eps=1e-6)
        if dims.has_attention:
            sizes.append((dims.num_heads, dims.head_dim))
            if self.attention_read_norm:
                self.attention_norm = RMSNorm(dims.head_dim, eps=1e-6)
        self.heads = [heads for heads, _ in sizes]
        self.gate_proj = nn.Linear(dims.hidden_size, sum(self.heads))
        widths = [heads * dim for heads, dim in sizes]
        # one projection of the sum where both reads have one size
        self.is_joint = len(set(sizes)) == 1
        width = widths[0] if self.is_joint else sum(widths)
        self.o_proj = nn.Linear(width, dims.hidden_size, bias=self.bias)
        if self.output_gate:
            self.g_proj = nn.Linear(dims.hidden_size, width, bias=False)

    def weights(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, T, H, reads]` -> the weight of each read, memory first."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        """See `hamblocks.protocols.Combiner`."""
        reads = []
        if memory_read is not None:
            reads.append(self.memory_norm(memory_read) if self.read_norm else memory_read)
        if attention_read is not None:
            normed = self.attention_read_norm
            reads.append(self.attention_norm(attention_read) if normed else attention_read)
        # decoding: a linear map of a matrix takes fewer ops
        logits = self.gate_proj(x[:, 0] if x.shape[1] == 1 else x)
        if self.is_joint:
            shape = *x.shape[:2], self.heads[0], len(reads)
            weights = self.weights(logits.view(shape)).to(x.dtype)
            # slices instead of unbind: inductor in torch 2.13 computes wrong gradients of unbind
            mixed = weights[..., :1] * reads[0]
            if len(reads) == 2:
                mixed = torch.addcmul(mixed, weights[..., 1:], reads[1])
            joined = mixed.to(x.dtype).flatten(2)
        else:
            weights = self.apart(logits.view(*x.shape[:2], -1)).to(x.dtype)
            first = weights[..., : self.heads[0], None] * reads[0]
            second = weights[..., self.heads[0] :, None] * reads[1]
            # one product of both reads, side by side, is the sum of two projections
            joined = torch.cat([first.to(x.dtype).flatten(2), second.to(x.dtype).flatten(2)], -1)
        if self.output_gate:
            joined = joined * F.silu(self.g_proj(x))
        y: Tensor = self.o_proj(joined)
        return y

    def apart(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, T, heads of both reads]` -> weights, for reads of different sizes."""
        raise NotImplementedError


@final
class GatedSum(_Mix):
    """Joins the reads with one sigmoid gate each; the gates are independent."""

    def weights(self, logits: Tensor) -> Tensor:
        """Sigmoid: each weight is in (0, 1)."""
        return logits.sigmoid()

    def apart(self, logits: Tensor) -> Tensor:
        """Sigmoid: each weight is in (0, 1)."""
        return logits.sigmoid()


@final
class SoftmaxMix(_Mix):
    """Joins the reads with gates that sum to one."""

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters.

        Raises:
            ValueError: the reads have different numbers of heads.
        """
        super().make(dims)
        if len(set(self.heads)) > 1:
            got = f"{self.heads[0]} heads of the memory and {self.heads[1]} of attention"
            raise wrong("combiner", "reads with equally many heads, or GatedSum()", got)

    def weights(self, logits: Tensor) -> Tensor:
        """A softmax over the reads."""
        return torch.softmax(logits, -1)

    def apart(self, logits: Tensor) -> Tensor:
        """A softmax over the reads of every head."""
        return torch.softmax(logits.unflatten(-1, (2, -1)), -2).flatten(-2)


@final
class ConstantStart(nn.Linear):
    """A linear map whose result does not depend on its input at the start.

    Attributes:
        start: the result at the start, which is its bias; its weight is 0.
    """

    def __init__(self, in_features: int, start: Sequence[float]) -> None:
        """Makes the map to `len(start)` numbers."""
        super().__init__(in_features, len(start))
        self.start = list(start)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(self.fresh_bias())

    def fresh_bias(self) -> Tensor:
        """The bias at the start."""
        return torch.tensor(self.start)


@final
class ScaledSum(_Mix):
    """Adds the memory's read to attention's, each scaled per head; it starts at attention alone.

    `y = o_proj(a * attention_read + m * norm(memory_read))`, with a and m `[H]` from `gate_proj(x)`,
    whose weight starts at 0 and whose bias starts at a = 1 and m = 0. So a layer of a trained
    attention model, given a memory, starts as it was. Where the memory is the only read, m starts
    at 1.
    """

    def __init__(self, bias: bool = False, read_norm: bool = True) -> None:
        """Makes the part; the layer that owns it makes the parameters.

        Args:
            bias: whether `o_proj` has a bias.
            read_norm: normalise the memory's read per head; False: take it as it is. The read of
                attention is never normalised.
        """
        super().__init__(read_norm=read_norm)
        self.attention_read_norm, self.bias = False, bias

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        super().make(dims)
        if len(self.heads) == 1:
            start = [1.0] * self.heads[0]
        elif self.is_joint:  # memory and attention take turns, head by head
            start = [0.0, 1.0] * self.heads[0]
        else:
            start = [0.0] * self.heads[0] + [1.0] * self.heads[1]
        self.gate_proj = ConstantStart(dims.hidden_size, start)

    def weights(self, logits: Tensor) -> Tensor:
        """The logits themselves."""
        return logits

    def apart(self, logits: Tensor) -> Tensor:
        """The logits themselves."""
        return logits
