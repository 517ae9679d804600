"""Query gates: they decide which queries read the stored tokens."""

from __future__ import annotations

import numbers
from typing import cast, final

import torch
from torch import Tensor, nn

from hamblocks.controllers import FixedThreshold
from hamblocks.protocols import (
    Buildable,
    Controller,
    Gate,
    HasMetric,
    LayerDims,
    MemoryTrace,
    QueryGateOutput,
    check_count,
    check_part,
    reads_given,
    surrogate_gradient,
)
from hamblocks.reachable import is_controller
from hamblocks_ops.arguments import wrong


@final
class ThresholdQueries(nn.Module):
    """A query reads if its score, of any gate, reaches tau.

        ThresholdQueries(PredictionEntropy(vocab_size), TargetFraction(0.2))  # reads when unsure
        ThresholdQueries(LearnedRouter(), TargetFraction(0.25), window=64)

    The score is the mean over the gate's heads. The logit bias of a learned gate becomes the weight
    of the read, exp(bias): sigmoid(MLP(x)) for `LearnedRouter`, which so learns where to read.
    """

    gate: Gate
    controller: Controller

    def __init__(self, gate: Gate, controller: Controller | float, window: int = 0) -> None:
        """Makes the query gate.

        Args:
            gate: scores the tokens. Its parameters and its `metric` become those of this part.
            controller: sets tau: a `hamblocks.protocols.Controller`, or a number for a fixed tau.
            window: tokens that a query which does not read still sees, itself included, as far as
                they are stored; >= 0.

        Raises:
            ValueError: an argument is not what is expected.
        """
        super().__init__()
        check_part("gate", gate)
        check_count("window", window)
        if isinstance(controller, numbers.Real):
            controller = FixedThreshold(cast("float", controller))
        if not is_controller(controller):
            expected = "a number or a Controller (called with a score, and with a method step())"
            raise wrong("controller", expected, controller)
        self.gate, self.controller, self.window = gate, controller, window
        if isinstance(gate, HasMetric):
            self.metric = gate.metric
        self.reads_given = reads_given(gate)
        self.surrogate_gradient = surrogate_gradient(gate)

    def build(self, dims: LayerDims) -> None:
        """Builds the gate, if it has parameters."""
        if isinstance(self.gate, Buildable):
            self.gate.build(dims)

    def forward(self, x: Tensor, trace: MemoryTrace) -> QueryGateOutput:
        """See `hamblocks.protocols.QueryGate`."""
        score, bias = self.gate(x, trace)
        score = score.detach().mean(-1, keepdim=True)
        tau = self.controller(score)
        weight = None if bias is None else bias.mean(-1, keepdim=True).exp()
        # as in a threshold selector: an infinite tau admits nothing
        reads = (score >= tau) & (tau < torch.inf)
        return QueryGateOutput(reads.squeeze(-1), weight, self.window)
