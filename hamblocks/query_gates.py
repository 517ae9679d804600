"""Query gates: they decide which queries read the stored tokens."""

from __future__ import annotations

import contextlib
from typing import final

from torch import Tensor

from hamblocks.controllers import controller_of
from hamblocks.gates.around import AroundGate
from hamblocks.heads import ScoreHeads, all_heads, one_score, shared_call
from hamblocks.protocols import (
    Controller,
    Gate,
    MemoryTrace,
    QueryGateOutput,
    check_count,
)
from hamblocks_ops.select import reaches


@final
class ThresholdQueries(AroundGate):
    """A query reads if its score, of any gate, reaches tau.

        ThresholdQueries(PredictionEntropy(vocab_size), TargetFraction(0.2))  # reads when unsure
        ThresholdQueries(LearnedRouter(), TargetFraction(0.25), window=64)

    The score is the mean over the gate's heads. A learned gate learns through its logit bias: the
    read is multiplied by exp(bias), with the mean bias over heads. For `LearnedRouter` this is the
    geometric mean of sigmoid(MLP(x)) over heads.
    """

    score_heads: ScoreHeads = "one"
    """See `hamblocks.heads.HasScoreHeads`."""

    controller: Controller

    def __init__(self, gate: Gate, controller: Controller | float, window: int = 0) -> None:
        """Makes the query gate.

        Args:
            gate: scores the tokens. Its parameters and its `metric` become those of this part.
            controller: sets tau: a `hamblocks.protocols.Controller`, or a number for a fixed tau.
            window: tokens that a query which does not read still sees, itself included, as far as
                they are stored; >= 0.

        Raises:
            ValueError: `gate` is not a gate, `controller` is neither a controller nor a number, or
                `window` is not an integer >= 0.
        """
        super().__init__(gate)
        window = check_count("window", window)
        self.controller, self.window = controller_of(controller), window

    def forward(self, x: Tensor, trace: MemoryTrace) -> QueryGateOutput:
        """See `hamblocks.protocols.QueryGate`."""
        score, bias = self.gate(x, trace)
        score = all_heads(score.detach()).mean(-1, keepdim=True)
        with contextlib.nullcontext() if shared_call() is None else one_score():
            tau = self.controller(score)
        weight = None if bias is None else all_heads(bias).mean(-1, keepdim=True).exp()
        return QueryGateOutput(reaches(score, tau).squeeze(-1), weight, self.window)
