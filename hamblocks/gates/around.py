"""The base of gates and query gates that wrap another gate."""

from __future__ import annotations

from torch import nn

from hamblocks.protocols import (
    Buildable,
    Gate,
    HasMetric,
    LayerDims,
    check_part,
    reads_given,
    surrogate_gradient,
)


class AroundGate(nn.Module):
    """A module that holds a gate and has the gate's attributes that a layer reads.

    These are `metric` (if the gate has one), `reads_given` and `surrogate_gradient`.
    """

    gate: Gate

    def __init__(self, gate: Gate) -> None:
        """Takes the gate.

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
        """Builds the gate, if it has parameters."""
        if isinstance(self.gate, Buildable):
            self.gate.build(dims)
