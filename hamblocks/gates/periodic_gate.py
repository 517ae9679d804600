"""A stride, as a control experiment."""

from __future__ import annotations

import numbers
from typing import final

from torch import Tensor

from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace, check_count
from hamblocks_ops.arguments import wrong


@final
class PeriodicGate:
    """Scores every n-th token 1 and the others 0; `Threshold(0.5)` then stores a stride of n."""

    score_heads: ScoreHeads = "one"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __init__(self, n: int, offset: int = 0) -> None:
        """Makes the gate.

        Args:
            n: tokens from one that scores 1 to the next, at least 1.
            offset: any position that scores 1; so do those that are a multiple of `n` away.

        Raises:
            ValueError: `n` is not an integer of at least 1, or `offset` no integer.
        """
        n = check_count("n", n, 1)
        is_integer = isinstance(offset, numbers.Integral)
        if not is_integer:  # no position would score 1
            raise wrong("offset", "an integer", offset)
        self.n, self.offset = n, offset

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, 1]`, float32, the same for all heads."""
        return GateOutput(((trace.position - self.offset) % self.n == 0).float()[..., None])

    def __repr__(self) -> str:
        return f"PeriodicGate({self.n}, offset={self.offset})"
