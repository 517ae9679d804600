"""Combiners: they join the outputs ("reads") of the memory and of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.heads import How, OnFirstRank, Split
from hamblocks.norm import RMSNorm
from hamblocks.own_weights import is_plain
from hamblocks.protocols import Built, LayerDims
from hamblocks_ops import decode
from hamblocks_ops.arguments import wrong

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
"""Activations of the gates on a read, by name."""


class _Mix(Built):
    """Weights each read per head by a gate on x, and projects the sum; reads are normalised first.

    The norm is RMSNorm per head. It cancels any factor of a whole read, such as that of a null
    sink. A layer with only one read has one norm and one gate. Where the memory has other head
    sizes than attention, each read has a projection of its own, and the projections are added.
    """

    memory_g_proj: nn.Linear
    attention_g_proj: nn.Linear

    def __init__(self, output_gate: bool = False, read_norm: bool = True) -> None:
        """Stores the arguments; parameters are made when a layer takes the part.

        Args:
            output_gate: multiply the joined reads by SiLU(g_proj(x)), channel by channel, before
                `o_proj`, as `fla.layers.GatedDeltaNet` does.
            read_norm: normalise each read per head; False: take it as it is.
        """
        super().__init__()
        self.output_gate, self.read_norm = output_gate, read_norm
        self.attention_read_norm, self.bias = read_norm, False
        self.norm_eps = 1e-6
        self.memory_gate: str | None = None
        self.attention_gate: str | None = None

    def make(self, dims: LayerDims) -> None:
        sizes = []
        if dims.has_memory:
            sizes.append(dims.memory_read)
            if self.read_norm:
                self.memory_norm = RMSNorm(dims.memory_read[1], eps=self.norm_eps)
        if dims.has_attention:
            sizes.append((dims.num_heads, dims.head_dim))
            if self.attention_read_norm:
                self.attention_norm = RMSNorm(dims.head_dim, eps=self.norm_eps)
        self.heads = [heads for heads, _ in sizes]
        self.gate_proj = nn.Linear(dims.hidden_size, sum(self.heads))
        widths = self.widths = [heads * dim for heads, dim in sizes]
        # one projection of the sum where both reads have one size
        self.is_joint = len(set(sizes)) == 1
        width = widths[0] if self.is_joint else sum(widths)
        self.o_proj = nn.Linear(width, dims.hidden_size, bias=self.bias)
        if self.output_gate:
            self.g_proj = nn.Linear(dims.hidden_size, width, bias=False)

    def split_heads(self, ranks: int) -> dict[str, How]:
        """See `hamblocks.heads.SplitsHeads`."""
        if self.is_joint:  # the gates of a head are adjacent rows
            gates, widths = Split(0, [sum(self.heads)]), [self.widths[0]]
        else:
            gates, widths = Split(0, self.heads, is_small=True), self.widths
        self.heads = [heads // ranks for heads in self.heads]
        is_small = len(widths) > 1
        splits: dict[str, How] = {
            "gate_proj.weight": gates,
            "gate_proj.bias": gates,
            "o_proj.weight": Split(1, widths, is_small),
            "g_proj.weight": Split(0, widths, is_small),
            "o_proj.bias": OnFirstRank(),
        }
        return {name: split for name, split in splits.items() if self._has(name)}

    def _has(self, name: str) -> bool:
        return name in dict(self.named_parameters())

    def weights(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, T, H, reads]` -> the weight of each read, memory first."""
        raise NotImplementedError

    def normed(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> list[Tensor]:
        """The reads that are not None, after their norms and gates, memory first.

        Each is `[B, T, heads, size]` of its own part.
        """
        reads = []
        if memory_read is not None:
            read = self.memory_norm(memory_read) if self.read_norm else memory_read
            if self.memory_gate is not None:
                read = _gated(read, self.memory_gate, self.memory_g_proj(x))
            reads.append(read)
        if attention_read is not None:
            normed = self.attention_read_norm
            read = self.attention_norm(attention_read) if normed else attention_read
            if self.attention_gate is not None:
                read = _gated(read, self.attention_gate, self.attention_g_proj(x))
            reads.append(read)
        return reads

    def forward(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        """See `hamblocks.protocols.Combiner`."""
        # decoding: a linear map of a matrix takes fewer ops
        logits = self.gate_proj(x[:, 0] if x.shape[1] == 1 else x)
        joined = None
        if x.device.type in decode.DEVICES:
            joined = self._decoded(memory_read, attention_read, logits)
        if joined is None:
            joined = self._joined(x, memory_read, attention_read, logits)
        if self.output_gate:
            joined = joined * F.silu(self.g_proj(x))
        y: Tensor = self.o_proj(joined)
        return y

    def _decoded(
        self, memory_read: Tensor | None, attention_read: Tensor | None, logits: Tensor
    ) -> Tensor | None:
        """What `_joined` gives for one token, by one kernel; None where it cannot run."""
        return None

    def _joined(
        self,
        x: Tensor,
        memory_read: Tensor | None,
        attention_read: Tensor | None,
        logits: Tensor,
    ) -> Tensor:
        """The weighted sum of the reads, `[B, T, width]`, or both side by side."""
        reads = self.normed(x, memory_read, attention_read)
        if self.is_joint:
            shape = *x.shape[:2], self.heads[0], len(reads)
            weights = self.weights(logits.view(shape)).to(x.dtype)
            # slices instead of unbind: inductor in torch 2.13 computes wrong gradients of unbind
            mixed = weights[..., :1] * reads[0]
            if len(reads) == 2:
                mixed = torch.addcmul(mixed, weights[..., 1:], reads[1])
            return mixed.to(x.dtype).flatten(2)
        weights = self.apart(logits.view(*x.shape[:2], -1)).to(x.dtype)
        first = weights[..., : self.heads[0], None] * reads[0]
        second = weights[..., self.heads[0] :, None] * reads[1]
        # one product of both reads, side by side, is the sum of two projections
        return torch.cat([first.to(x.dtype).flatten(2), second.to(x.dtype).flatten(2)], -1)

    def apart(self, logits: Tensor) -> Tensor:
        """As `weights`, for reads of different sizes: `[B, T, heads of both reads]`."""
        raise NotImplementedError


@final
class GatedSum(_Mix):
    """Joins the reads with one sigmoid gate each; the gates are independent.

    `y = o_proj(m * norm(memory_read) + a * norm(attention_read))`, with m and a `[H]` from
    `sigmoid(gate_proj(x))`, and RMSNorm per head.

    Args:
        output_gate: multiply the sum by SiLU(g_proj(x)), channel by channel, before `o_proj`, as
            `fla.layers.GatedDeltaNet` does.
        read_norm: normalise each read per head; False: take it as it is.
    """

    def _decoded(
        self, memory_read: Tensor | None, attention_read: Tensor | None, logits: Tensor
    ) -> Tensor | None:
        if memory_read is None or attention_read is None or not self.is_joint:
            return None
        # the kernel has no gate per channel, which would follow the norm of a read
        if memory_read.shape[1] != 1 or self.memory_gate or self.attention_gate:
            return None
        normed = [self.memory_norm] if self.read_norm else []
        normed += [self.attention_norm] if self.attention_read_norm else []
        weights = [norm.weight for norm in normed]
        if not decode.runs(memory_read, attention_read, logits, *weights) or not is_plain(*normed):
            return None
        first = weights[0] if self.read_norm else None
        second = weights[-1] if self.attention_read_norm else None
        reads = memory_read, attention_read
        return decode.mix(reads, (first, second), logits, self.norm_eps)

    def weights(self, logits: Tensor) -> Tensor:
        """Sigmoid: each weight is in (0, 1)."""
        return logits.sigmoid()

    def apart(self, logits: Tensor) -> Tensor:
        """Sigmoid: each weight is in (0, 1)."""
        return logits.sigmoid()


@final
class SoftmaxMix(_Mix):
    """Joins the reads as `GatedSum` does, with a softmax over the two gates of each head.

    Args:
        output_gate: as in `GatedSum`.
        read_norm: as in `GatedSum`.
    """

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
    """A linear map that returns a constant at initialisation: its weight is 0.

    Attributes:
        start: the initial bias, `out_features` numbers.
    """

    def __init__(self, in_features: int, start: Sequence[float]) -> None:
        """Makes the map from `in_features` to `len(start)` channels."""
        super().__init__(in_features, len(start))
        self.start = list(start)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(self.fresh_bias())

    def fresh_bias(self) -> Tensor:
        """The initial bias, `[out_features]`."""
        return torch.tensor(self.start)


@final
class ScaledSum(_Mix):
    """Adds the memory's read to attention's, each scaled per head; initially one of them is 0.

    `y = o_proj(a * attention_read + m * norm(memory_read))`, with a and m `[H]` from
    `gate_proj(x)`, whose weight starts at 0 and whose bias starts at a = 1 and m = 0. So a trained
    attention layer to which a memory is added computes the same as before. With `start="memory"`
    the bias starts at a = 0 and m = 1, for a trained recurrent layer to which attention is added.
    Where a layer has one read, its scale starts at 1.
    """

    def __init__(
        self,
        bias: bool = False,
        read_norm: bool = True,
        *,
        start: str = "attention",
        norm_eps: float = 1e-6,
        memory_gate: str | None = None,
        attention_gate: str | None = None,
    ) -> None:
        """Stores the arguments; parameters are made when a layer takes the part.

        Args:
            bias: whether `o_proj` and `attention_g_proj` have biases.
            read_norm: normalise the memory's read per head; False: take it as it is. The read of
                attention is never normalised.
            start: the read whose scale starts at 1, "attention" or "memory".
            norm_eps: epsilon of the norm.
            memory_gate: multiply the memory's read, after its norm, by an activation of
                `memory_g_proj(x)`, channel by channel: "silu", as Gated DeltaNet does, or
                "sigmoid". None: no gate.
            attention_gate: the same for the read of attention, by `attention_g_proj(x)`; "sigmoid"
                is the gate of Qwen3-Next (arXiv 2505.06708).

        Raises:
            ValueError: there is no such start or gate.
        """
        super().__init__(read_norm=read_norm)
        if start not in ("attention", "memory"):
            raise wrong("start", '"attention" or "memory"', repr(start))
        for name, gate in (("memory_gate", memory_gate), ("attention_gate", attention_gate)):
            if gate is not None and gate not in GATES:
                raise wrong(name, f"None or one of {', '.join(GATES)}", repr(gate))
        self.attention_read_norm, self.bias, self.start = False, bias, start
        self.norm_eps = norm_eps
        self.memory_gate, self.attention_gate = memory_gate, attention_gate

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        super().make(dims)
        memory, attention = (0.0, 1.0) if self.start == "attention" else (1.0, 0.0)
        if len(self.heads) == 1:
            start = [1.0] * self.heads[0]
        elif self.is_joint:  # for each head: memory, attention
            start = [memory, attention] * self.heads[0]
        else:
            start = [memory] * self.heads[0] + [attention] * self.heads[1]
        self.gate_proj = ConstantStart(dims.hidden_size, start)
        if dims.has_memory and self.memory_gate is not None:
            heads, size = dims.memory_read
            self.memory_g_proj = nn.Linear(dims.hidden_size, heads * size, bias=False)
        if dims.has_attention and self.attention_gate is not None:
            width = dims.num_heads * dims.head_dim
            self.attention_g_proj = nn.Linear(dims.hidden_size, width, bias=self.bias)

    def split_heads(self, ranks: int) -> dict[str, How]:
        """See `hamblocks.heads.SplitsHeads`."""
        splits = super().split_heads(ranks)
        for name in ("memory_g_proj.weight", "attention_g_proj.weight", "attention_g_proj.bias"):
            if self._has(name):
                splits[name] = Split(0, [self.get_parameter(name).shape[0]])
        return splits

    def weights(self, logits: Tensor) -> Tensor:
        """The logits themselves."""
        return logits

    def apart(self, logits: Tensor) -> Tensor:
        """The logits themselves."""
        return logits


def _gated(read: Tensor, gate: str, logits: Tensor) -> Tensor:
    """A read `[B, T, H, D]`, multiplied by an activation of logits `[B, T, H * D]`."""
    return read * GATES[gate](logits).view(read.shape).to(read.dtype)
