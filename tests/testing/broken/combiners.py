import torch
from torch import nn
from torch.nn import functional as F

import hamblocks as hb

from . import rejected_by


class Combiner(hb.protocols.Built):
    """A correct combiner: concatenates the two reads and projects them."""

    def make(self, dims):
        self.out = nn.Linear(2 * dims.num_heads * dims.head_dim, dims.hidden_size, bias=False)

    def forward(self, x, memory_read, attention_read):
        return self.out(torch.cat([memory_read, attention_read], -1).flatten(2))


@rejected_by("combiner_has_its_shapes")
class LeavesHeads(Combiner):
    """Returns heads without a projection, in another size than x."""

    def forward(self, x, memory_read, attention_read):
        return (memory_read + attention_read).flatten(2)[..., :-1]


@rejected_by("combiner_is_causal")
class PoolsTime(Combiner):
    """Subtracts the mean over time."""

    def forward(self, *reads):
        y = super().forward(*reads)
        return y - y.mean(1, keepdim=True)


@rejected_by("combiner_is_causal")
class ScalesByTheSequence(Combiner):
    """Scales the memory's read by its largest value over all time."""

    def make(self, dims):
        self.inner = hb.ScaledSum(read_norm=False)
        self.inner.build(dims)
        torch.nn.init.ones_(self.inner.gate_proj.bias)

    def forward(self, x, memory_read, attention_read):
        peak = memory_read.abs().amax(1, keepdim=True)
        return self.inner(x, memory_read / (1 + peak), attention_read)


@rejected_by("combiner_gradients_are_causal")
class GradientOverTime(Combiner):
    """Adds a sum over later tokens minus itself, detached: only its gradient is left."""

    def forward(self, x, memory_read, attention_read):
        later = memory_read.flip(1).cumsum(1).flip(1)
        return super().forward(x, memory_read + later - later.detach(), attention_read)


@rejected_by("combiner_rows_are_independent")
class NormOverTheBatch(Combiner):
    """Normalizes over the batch."""

    def forward(self, x, memory_read, attention_read):
        return super().forward(
            x, memory_read / (1 + memory_read.norm(dim=0, keepdim=True)), attention_read
        )


@rejected_by("combiner_packed_is_one_by_one")
class LooksBack(Combiner):
    """Uses the attention read of the token before."""

    def forward(self, x, memory_read, attention_read):
        return super().forward(x, memory_read, F.pad(attention_read, [0, 0, 0, 0, 1, 0])[:, :-1])


@rejected_by("combiner_any_split_is_one_pass")
class WeightsByPlace(Combiner):
    """Fades the memory in along each piece."""

    def forward(self, x, memory_read, attention_read):
        fade = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[None, :, None, None]
        return super().forward(x, fade * memory_read, attention_read)


@rejected_by("combiner_same_call_same_bits")
class AlwaysDropout(Combiner):
    """Applies dropout in eval mode too."""

    def forward(self, *reads):
        return F.dropout(super().forward(*reads), 0.1)


@rejected_by("combiner_nothing_given_changes")
class AddsInPlace(Combiner):
    """Adds one read to the other in place."""

    def forward(self, x, memory_read, attention_read):
        with torch.no_grad():
            memory_read.add_(attention_read)
        return super().forward(x, memory_read, attention_read)


@rejected_by("combiner_strides_do_not_matter")
class TrustsLayout(Combiner):
    """Assumes that the attention read is contiguous."""

    def forward(self, x, memory_read, attention_read):
        dense = torch.as_strided(
            attention_read, attention_read.shape, torch.empty(attention_read.shape).stride()
        )
        return super().forward(x, memory_read, dense)


@rejected_by("combiner_reads_no_unwritten_memory")
class EmptyBuffer(Combiner):
    """Adds zero times uninitialised memory."""

    def forward(self, x, memory_read, attention_read):
        return super().forward(x, memory_read + 0 * torch.empty_like(memory_read), attention_read)


@rejected_by("combiner_is_always_finite")
class NormWithoutEpsilon(Combiner):
    """Uses an RMS norm without an epsilon."""

    def forward(self, x, memory_read, attention_read):
        return super().forward(
            x, memory_read / memory_read.square().mean(-1, keepdim=True).sqrt(), attention_read
        )


@rejected_by("combiner_gradients_are_right")
class HalfDetached(Combiner):
    """Detaches the scale of a norm."""

    def forward(self, x, memory_read, attention_read):
        scale = (memory_read.square().mean(-1, keepdim=True) + 1e-6).rsqrt().detach()
        return super().forward(x, memory_read * scale, attention_read)


@rejected_by("combiner_state_dict_is_all_there_is")
class UnsavedGate(Combiner):
    """Draws a weight of the memory that is neither parameter nor buffer."""

    def make(self, dims):
        super().make(dims)
        self.weight = torch.rand(dims.num_heads, 1)

    def forward(self, x, memory_read, attention_read):
        return super().forward(x, self.weight.to(x.dtype) * memory_read, attention_read)


@rejected_by("combiner_compiled_is_eager")
class BranchesOnValues(Combiner):
    """Branches on values: skips attention where it read nothing."""

    def forward(self, x, memory_read, attention_read):
        if not attention_read.detach().any():
            attention_read = torch.zeros_like(attention_read)
        return super().forward(x, memory_read, attention_read)


@rejected_by("combiner_is_built_once")
class SharedProjection(Combiner):
    """Ignores a second build."""

    def build(self, dims):
        if not hasattr(self, "out"):
            self.make(dims)


@rejected_by("combiner_works_in_a_layer")
class AssumesABatch(Combiner):
    """Smooths with the result of its last call, which it keeps."""

    last = 0

    def forward(self, *reads):
        y = super().forward(*reads)
        self.last = 0.5 * (y.detach().mean(1, keepdim=True) if y.shape[1] else 0) + 0.5 * self.last
        return y + self.last
