import torch
from torch import nn
from torch.nn import functional as F

import hamblocks as hb
from hamblocks.protocols import Built

from . import rejected_by


class Gate:
    """A gate that is right: how loud a token is."""

    def __call__(self, x, trace):
        return hb.GateOutput(self.score(x, trace))

    def score(self, x, trace):
        return x.float().square().mean(-1, keepdim=True)


class Router(Built):
    """A learned gate that is right."""

    def make(self, dims):
        self.proj = nn.Linear(dims.hidden_size, dims.num_kv_heads)

    def forward(self, x, trace):
        logit = self.proj(x)
        return hb.GateOutput(logit.detach().sigmoid(), F.logsigmoid(logit))


@rejected_by("gate_can_be_called")
class ReturnsATensor(Gate):
    """Returns the score, without a GateOutput around it."""

    def __call__(self, x, trace):
        return self.score(x, trace)


@rejected_by("gate_can_be_called")
class TakesNoTrace(Gate):
    """Has another signature than a layer calls."""

    def __call__(self, x):
        return hb.GateOutput(self.score(x, None))


@rejected_by("gate_has_its_shapes")
class FlatScore(Gate):
    """The dimension of heads is missing."""

    def score(self, x, trace):
        return x.float().square().mean(-1)


@rejected_by("gate_has_its_shapes")
class TooManyHeads(Gate):
    """One score per channel."""

    def score(self, x, trace):
        return x.float().abs()


@rejected_by("gate_is_causal")
class Peeks(Gate):
    """Scores a token by the next one."""

    def score(self, x, trace):
        return super().score(x.roll(-1, 1), trace)


@rejected_by("gate_is_causal")
class Standardized(Gate):
    """Scores are made comparable by the mean of the whole sequence."""

    def score(self, x, trace):
        score = super().score(x, trace)
        return score - score.mean(1, keepdim=True)


@rejected_by("gate_is_causal")
class RelativeKeyNorm(Gate):
    """Norms of keys are divided by the largest of the call."""

    def score(self, x, trace):
        norm = trace.stored_k.detach().float().norm(dim=-1)
        return norm / (norm.amax(1, keepdim=True) + 1)


@rejected_by("gate_has_its_shapes")
class NormOfChannels(Gate):
    """The norm of every channel of a value, over heads."""

    def score(self, x, trace):
        return trace.stored_v.detach().float().norm(dim=2)


@rejected_by("gate_is_always_finite")
class KeyDirection(Gate):
    """The first entry of the unit key, which a key of zeros does not have."""

    def score(self, x, trace):
        k = trace.stored_k.detach().float()
        return (k / k.norm(dim=-1, keepdim=True))[..., 0]


@rejected_by("gate_gradients_are_causal")
class LeaksThroughTheBias(Router):
    """The value of the bias is right, its gradient passes through the mean of the sequence."""

    def forward(self, x, trace):
        score, bias = super().forward(x, trace)
        mean = bias.mean(1, keepdim=True)
        return hb.GateOutput(score, bias + mean - mean.detach())


@rejected_by("gate_is_causal")
class NormalizesInTraining(Router):
    """A batch norm: in training its mean is that of all tokens."""

    def make(self, dims):
        super().make(dims)
        self.norm = nn.BatchNorm1d(dims.hidden_size)

    def forward(self, x, trace):
        return super().forward(self.norm(x.mT).mT, trace)


@rejected_by("gate_is_causal")
class LargestOfItsBlock(Gate):
    """Every token of a full block of 32 scores as the largest of the block."""

    def score(self, x, trace):
        score = super().score(x, trace)
        end = score.shape[1] // 32 * 32
        blocks = score[:, :end].unflatten(1, (-1, 32))
        blocks = blocks.amax(2, keepdim=True).expand_as(blocks).flatten(1, 2)
        return torch.cat([blocks, score[:, end:]], 1)


@rejected_by("gate_rows_are_independent")
class BatchNorm(Gate):
    """Scores of a batch are divided by the largest of it."""

    def score(self, x, trace):
        score = super().score(x, trace)
        return score / (score.amax(0, keepdim=True) + 1)


@rejected_by("gate_packed_is_one_by_one")
class CrossesBorders(Gate):
    """Change against the token before, which in a packed row may be another sequence's."""

    def score(self, x, trace):
        return super().score(x - F.pad(x, [0, 0, 1, 0])[:, :-1], trace)


@rejected_by("gate_any_split_is_one_pass")
class CountsFromZero(Gate):
    """Positions are those of the piece, not of the sequence."""

    def score(self, x, trace):
        return super().score(x, trace) + torch.arange(x.shape[1])[None, :, None]


@rejected_by("gate_same_call_same_bits")
class Dithered(Gate):
    """Noise breaks ties."""

    def score(self, x, trace):
        score = super().score(x, trace)
        return score + 1e-6 * torch.rand_like(score)


@rejected_by("gate_nothing_given_changes")
class InPlace(Gate):
    """Squares x in place."""

    def score(self, x, trace):
        return x.detach().mul_(x.detach()).float().mean(-1, keepdim=True)


@rejected_by("gate_strides_do_not_matter")
class TrustsStrides(Gate):
    """Reads the memory behind x as if x lay in it in one piece."""

    def score(self, x, trace):
        flat = torch.as_strided(x, (x.numel(),), (1,)).view(x.shape) if x.numel() else x
        return super().score(flat, trace)


@rejected_by("gate_reads_no_unwritten_memory")
class WritesTheFirstHalf(Gate):
    """A buffer of which the last token of a sequence is never written."""

    def score(self, x, trace):
        score = torch.empty(*x.shape[:2], 1)
        score[:, :-1] = super().score(x, trace)[:, :-1]
        return score


@rejected_by("gate_is_always_finite")
class DividesByTheValue(Gate):
    """Relative error without a guard: 0 / 0 where the value is zero."""

    def score(self, x, trace):
        return trace.residual.float().norm(dim=-1) / trace.v.float().norm(dim=-1)


@rejected_by("gate_gradients_are_right")
class StraightThrough(Router):
    """A clamp that passes gradients through as if it were not there."""

    def forward(self, x, trace):
        score, bias = super().forward(x, trace)
        return hb.GateOutput(score, bias + (bias.clamp(min=-0.5) - bias).detach())


@rejected_by("gate_state_dict_is_all_there_is")
class HiddenWeights(nn.Module):
    """A weight that is an attribute, not a parameter or a buffer."""

    def build(self, dims):
        self.direction = torch.randn(dims.hidden_size)

    def forward(self, x, trace):
        return hb.GateOutput((x.float() @ self.direction)[..., None])


@rejected_by("gate_compiled_is_eager")
class ReadsOnTheHost(Gate):
    """Takes another way for loud batches."""

    def score(self, x, trace):
        score = super().score(x, trace)
        return score.sqrt() if score.sum().item() > 1e9 else score


@rejected_by("gate_is_built_once")
class BuiltTwice(nn.Module):
    """A second layer gets the weights of the first."""

    def build(self, dims):
        if not hasattr(self, "proj"):
            self.proj = nn.Linear(dims.hidden_size, 1)

    def forward(self, x, trace):
        return hb.GateOutput(self.proj(x).detach())


@rejected_by("gate_works_in_a_layer")
class Remembers(Gate):
    """Counts its calls, which a layer makes once per piece."""

    calls = 0

    def score(self, x, trace):
        self.calls += 1
        return super().score(x, trace) * self.calls


@rejected_by("gate_names_a_known_metric")
class Misspelt(Gate):
    """A metric that no memory knows."""

    metric = None

    def __init__(self):
        self.metric = "cosin"

    def score(self, x, trace):
        return super().score(x, trace)


@rejected_by("gate_bias_can_be_learned")
class DetachedBias(Router):
    """The gradient of the bias is dropped with that of the score."""

    def forward(self, x, trace):
        score, bias = super().forward(x, trace)
        return hb.GateOutput(score, bias.detach())


@rejected_by("gate_bias_can_be_learned")
class NoBias(Router):
    """Ranks tokens by a learned score and returns no bias, so that its weights get no gradient."""

    def forward(self, x, trace):
        return super().forward(x, trace)._replace(logit_bias=None)
