"""The score of LoLA: how badly the memory recalls a token that it has just written."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.requirements import write_of
from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace


@final
class RecallError:
    r"""Scores a token by the error of recalling its value right after the memory wrote it.

    The delta rule turns its decayed state \(\tilde S_t\) into \(S_t = \tilde S_t + \beta_t k_t
    r_t^\top\), with the residual \(r_t = v_t - \tilde S_t^\top k_t\). The error of recalling
    \(v_t\) from \(S_t\) by \(k_t\) therefore follows from the residual, without another read of the
    state:

    \[ \lvert v_t - S_t^\top k_t \rvert = \lvert 1 - \beta_t \lvert k_t \rvert^2 \rvert \,
    \lvert r_t \rvert \]

    The score is 0 where the memory writes the value in full (\(\beta_t = 1\), a key of unit
    length), and the norm of the residual where it writes nothing. The self-recall error is the
    score of LoLA (arXiv 2505.23666), which measures it when a token leaves the window, in a state
    that later tokens may have changed; this gate measures it at the token itself.
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
        missed = (1 - write.beta * write.k.square().sum(-1)).abs()
        return GateOutput(missed * write.residual.norm(dim=-1))

    def __repr__(self) -> str:
        return "RecallError()"
