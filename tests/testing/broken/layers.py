import math

import torch
from torch import nn

import hamblocks as hb

from . import rejected_by

DIMS = hb.LayerDims(8, 2, 1, 4)


def ham(**parts):
    return hb.HAMLayer(
        8, 2, num_kv_heads=1, **{"selector": hb.Threshold(0.9) | hb.Window(3), **parts}
    )


class Layer(hb.HAMLayer):
    """A correct layer."""

    def __init__(self, **parts):
        super().__init__(8, 2, num_kv_heads=1, **{"selector": hb.TopK(3) | hb.Window(2), **parts})


class Gate:
    def __init__(self, score):
        self.score = score

    def __call__(self, x, trace):
        return hb.GateOutput(self.score(x, trace))


@rejected_by("layer_has_its_shapes")
class LosesADtype(Layer):
    """Returns float32 for inputs of lower precision."""

    def forward(self, x, **call):
        result = super().forward(x, **call)
        return result._replace(y=result.y.to(torch.promote_types(x.dtype, torch.float32)))


@rejected_by("layer_is_causal")
def looks_ahead():
    """Its gate looks one token ahead."""
    return ham(
        gate=Gate(lambda x, trace: x.roll(-1, 1).mean(-1, keepdim=True)), selector=hb.Threshold(0.0)
    )


@rejected_by("layer_gradients_are_causal")
class GradientFromLater(Layer):
    """Adds the mean over the sequence minus itself, detached: only its gradient is left."""

    def forward(self, x, **call):
        result = super().forward(x, **call)
        mean = result.y.mean(1, keepdim=True)
        return result._replace(y=result.y + mean - mean.detach())


@rejected_by("layer_rows_are_independent")
class BatchMean(Layer):
    """Subtracts the mean of the batch."""

    def forward(self, x, **call):
        return super().forward(x - 0.1 * x.mean(0, keepdim=True), **call)


@rejected_by("layer_packed_is_one_by_one")
class PacksBlindly(Layer):
    """Treats packed sequences as one."""

    def forward(self, x, *, state=None, cu_seqlens=None):
        return super().forward(x, state=state, cu_seqlens=cu_seqlens if state is not None else None)


@rejected_by("layer_any_split_is_one_pass")
class RestartsPositions(Layer):
    """Forgets the memory between pieces."""

    def forward(self, x, *, state=None, cu_seqlens=None):
        result = super().forward(x, state=state, cu_seqlens=cu_seqlens)
        if state is not None:
            result = result._replace(state=result.state._replace(memory=None))
        return result


@rejected_by("layer_packed_pieces_are_one_pass")
class SwapsPackedStates(Layer):
    """Returns the memories of packed sequences in reverse order."""

    def forward(self, x, *, state=None, cu_seqlens=None):
        result = super().forward(x, state=state, cu_seqlens=cu_seqlens)
        if state is not None and cu_seqlens is not None:
            flipped = type(result.state.memory)(*(part.flip(0) for part in result.state.memory))
            result = result._replace(state=result.state._replace(memory=flipped))
        return result


@rejected_by("layer_same_call_same_bits")
def random_gate():
    """Selects random tokens in every call."""
    return ham(gate=Gate(lambda x, trace: torch.rand(*x.shape[:2], 1)), selector=hb.Threshold(0.5))


@rejected_by("layer_nothing_given_changes")
class NormalizesInPlace(Layer):
    """Centres x in place."""

    def forward(self, x, **call):
        with torch.no_grad():
            x.sub_(x.mean(-1, keepdim=True))
        return super().forward(x, **call)


@rejected_by("layer_strides_do_not_matter")
class DenseInput(Layer):
    """Assumes that x is contiguous."""

    def forward(self, x, **call):
        return super().forward(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), **call)


@rejected_by("layer_reads_no_unwritten_memory")
class AddsEmpty(Layer):
    """Adds zero times uninitialised memory."""

    def forward(self, x, **call):
        result = super().forward(x, **call)
        return result._replace(y=result.y + 0 * torch.empty_like(result.y))


@rejected_by("layer_is_always_finite")
class DividesByItsNorm(Layer):
    """Divides x by its norm, which may be 0."""

    def forward(self, x, **call):
        return super().forward(x / x.norm(dim=-1, keepdim=True), **call)


@rejected_by("layer_gradients_are_right")
class DetachedResidual(Layer):
    """Adds x as a residual connection, detached."""

    def forward(self, x, **call):
        result = super().forward(x, **call)
        return result._replace(y=result.y + x.detach())


@rejected_by("layer_state_dict_is_all_there_is")
class RandomScale(Layer):
    """Scales weights when it loads a state dict."""

    def load_state_dict(self, state, **more):
        return super().load_state_dict({name: 1.5 * x for name, x in state.items()}, **more)


@rejected_by("layer_compiled_is_eager")
class BranchesOnX(Layer):
    """Branches on values: returns 0 for a batch of zeros."""

    def forward(self, x, **call):
        scale = 1.0 if x.detach().abs().sum() > 0 else 0.0
        result = super().forward(x, **call)
        return result._replace(y=scale * result.y)


@rejected_by("layer_stores_what_it_decided")
class NeverEvicts(Layer):
    """Reports longer lifetimes than its cache has."""

    def forward(self, x, *, state=None, cu_seqlens=None):
        result = super().forward(x, state=state, cu_seqlens=cu_seqlens)
        ends = result.stats.evict_at
        longer = torch.where(
            ends > result.stats.position[..., None], ends.clamp(max=2**30) + 1, ends
        )
        return result._replace(stats=result.stats._replace(evict_at=longer))


@rejected_by("layer_forks_go_on_alone")
class SharesTheMemory(Layer):
    """Updates the memory of a state in place, so that a fork changes with it."""

    def forward(self, x, *, state=None, cu_seqlens=None):
        result = super().forward(x, state=state, cu_seqlens=cu_seqlens)
        if state is not None and state.memory is not None:
            state.memory.recurrent.copy_(result.state.memory.recurrent)
        return result


@rejected_by("layer_low_precision_streams")
class FloatCache(Layer):
    """Returns float32 when it decodes one token."""

    def forward(self, x, **call):
        result = super().forward(x, **call)
        wide = torch.promote_types(x.dtype, torch.float32)
        return result._replace(y=result.y.to(wide)) if x.shape[1] == 1 else result


@rejected_by("layer_limits_of_the_threshold")
class AlwaysSeesItself(Layer):
    """Lets every token see itself, against the selector."""

    def forward(self, x, **call):
        given, self.selector = self.selector, hb.AnyOf(self.selector, hb.Window(1))
        try:
            return super().forward(x, **call)
        finally:
            self.selector = given


@rejected_by("layer_raising_tau_never_keeps_more")
class Inverted(Layer):
    """Stores tokens whose score is at most the threshold."""

    def __init__(self):
        super().__init__(selector=Below())


class Below(nn.Module):
    def __init__(self):
        super().__init__()
        self.controller = hb.FixedThreshold(0.5)

    def forward(self, score, ledger=None, *, position=None, cu_seqlens=None):
        tau = self.controller(score)
        tau = -tau if math.isfinite(float(tau)) else tau
        return hb.Selection(
            hb.ops.select_threshold(-score, tau, position=position, cu_seqlens=cu_seqlens)
        )


@rejected_by("layer_refuses_bad_input")
class PadsSilently(Layer):
    """Pads a narrow x with zeros."""

    def forward(self, x, **call):
        return super().forward(nn.functional.pad(x, [0, 8 - x.shape[-1]]), **call)
