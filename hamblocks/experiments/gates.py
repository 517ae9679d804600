"""Gates that only an experiment needs."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from hamblocks.protocols import GateOutput, MemoryTrace

GOLDEN = (math.sqrt(5) - 1) / 2


@final
class EvenlySpaced:
    """Stores tokens at even distances at any budget: score = position * golden ratio modulo 1.

    At every threshold the stored positions have at most three different distances (three-distance
    theorem), so this is the periodic control for a model that is moved through budgets.
    """

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, 1]`, float32."""
        return GateOutput(((trace.position.double() * GOLDEN) % 1).float()[..., None])
