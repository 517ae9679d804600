"""The score of HOLA: the norm of what the delta rule wrote."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.requirements import write_of
from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace


@final
class CommittedWrite:
    r"""Scores a token by what the memory wrote for it: \(\beta_t \lvert r_t \rvert\).

    The delta rule adds \(\beta_t k_t r_t^\top\) to its state, where the residual \(r_t\) is the
    value minus the prediction and the key has unit length. The score is the norm of this update.
    A token with a large residual but a small write strength \(\beta_t\) scores low. This is the
    score of HOLA (arXiv 2607.02303).
    """

    score_heads: ScoreHeads = "own"
    """See `hamblocks.heads.HasScoreHeads`."""

    metric: str | None = None
    """None: the memory returns the residual."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, H]`, float32 (or float64).

        Raises:
            ValueError: the layer has no memory, or the trace has no residual.
        """
        write = write_of(self, trace)
        return GateOutput(write.beta * write.residual.norm(dim=-1))

    def __repr__(self) -> str:
        return "CommittedWrite()"
