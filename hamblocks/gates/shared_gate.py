"""One decision for all heads of a layer."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from hamblocks.protocols import (
    Buildable,
    Gate,
    GateOutput,
    HasMetric,
    LayerDims,
    MemoryTrace,
    check_part,
    reads_given,
    surrogate_gradient,
)


@final
class SharedGate(nn.Module):
    """Averages the score and the logit bias of another gate over heads.

    The layer then takes one decision for all of its heads.
    """

    def __init__(self, gate: Gate) -> None:
        """Makes the gate.

        Args:
            gate: any gate. Its parameters and its `metric` become those of this gate.

        Raises:
            ValueError: `gate` is not a gate.
        """
        super().__init__()
        check_part("gate", gate)
        self.gate = gate
        if isinstance(gate, HasMetric):
            self.metric = gate.metric
        self.reads_given = reads_given(gate)
        self.surrogate_gradient = surrogate_gradient(gate)

    def build(self, dims: LayerDims) -> None:
        """Builds the inner gate, if it has parameters."""
        if isinstance(self.gate, Buildable):
            self.gate.build(dims)

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns score and logit bias, `[B, T, 1]`."""
        score, bias = self.gate(x, trace)
        return GateOutput(
            score.mean(-1, keepdim=True), None if bias is None else bias.mean(-1, keepdim=True)
        )
