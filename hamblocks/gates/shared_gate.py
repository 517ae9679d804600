"""One decision for all heads of a layer."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.around import AroundGate
from hamblocks.heads import ScoreHeads, all_heads
from hamblocks.protocols import Gate, GateOutput, MemoryTrace


@final
class SharedGate(AroundGate):
    """Averages the score and the logit bias of another gate over heads.

    The layer then takes one decision for all of its heads.
    """

    score_heads: ScoreHeads = "one"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __init__(self, gate: Gate) -> None:
        """Makes the gate.

        Args:
            gate: any gate. Its parameters and its `metric` become those of this gate.

        Raises:
            ValueError: `gate` is not a gate.
        """
        super().__init__(gate)

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns score and logit bias, `[B, T, 1]`."""
        score, bias = self.gate(x, trace)
        return GateOutput(
            all_heads(score).mean(-1, keepdim=True),
            None if bias is None else all_heads(bias).mean(-1, keepdim=True),
        )
