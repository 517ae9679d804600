from torch import nn

from hamblocks.protocols import Built, QueryGateOutput

from . import gates, rejected_by


class Asks(nn.Module):
    """A query gate around a gate: it is wrong where the gate is, and right around a right one."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        if hasattr(gate, "build"):
            self.build = gate.build

    def forward(self, x, trace):
        score, bias = self.gate(x, trace)
        score = score.mean(-1, keepdim=True)
        weight = score.detach().tanh() if bias is None else bias.mean(-1, keepdim=True).exp()
        return QueryGateOutput(score.squeeze(-1) > 0.5, weight, window=1)


AROUND = {
    "is_causal": gates.Peeks,
    "gradients_are_causal": gates.LeaksThroughTheBias,
    "rows_are_independent": gates.BatchNorm,
    "packed_is_one_by_one": gates.CrossesBorders,
    "any_split_is_one_pass": gates.CountsFromZero,
    "same_call_same_bits": gates.Dithered,
    "nothing_given_changes": gates.InPlace,
    "strides_do_not_matter": gates.TrustsStrides,
    "reads_no_unwritten_memory": gates.WritesTheFirstHalf,
    "is_always_finite": gates.DividesByTheValue,
    "gradients_are_right": gates.StraightThrough,
    "state_dict_is_all_there_is": gates.HiddenWeights,
    "compiled_is_eager": gates.ReadsOnTheHost,
    "is_built_once": gates.BuiltTwice,
    "works_in_a_layer": gates.Remembers,
    "weight_can_be_learned": gates.DetachedBias,
}


def _around(gate):
    def make():
        return Asks(gate())

    make.__name__ = gate.__name__
    return make


for _law, _gate in AROUND.items():
    rejected_by(f"query_gate_{_law}")(_around(_gate))


@rejected_by("query_gate_can_be_called")
class ReturnsAMask:
    """Returns the mask, without a QueryGateOutput around it."""

    def __call__(self, x, trace):
        return x[..., 0] > 0


@rejected_by("query_gate_can_be_called")
class NumbersAsMask:
    """Returns 0 and 1 as numbers."""

    def __call__(self, x, trace):
        return QueryGateOutput((x[..., 0] > 0).float())


@rejected_by("query_gate_has_its_shapes")
class OnePerHead:
    """Decides per head."""

    def __call__(self, x, trace):
        return QueryGateOutput(trace.k[..., 0] > 0)


@rejected_by("query_gate_weight_can_be_learned")
class NoWeight(Built):
    """Decides by a learned score and returns no weight, so that its weights get no gradient."""

    def make(self, dims):
        self.proj = nn.Linear(dims.hidden_size, 1)

    def forward(self, x, trace):
        return QueryGateOutput(self.proj(x)[..., 0] > 0)
