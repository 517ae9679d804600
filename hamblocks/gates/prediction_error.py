"""The surprise of the HAM paper: how far the memory's prediction missed the value."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.requirements import check_memory
from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace
from hamblocks_ops.arguments import wrong
from hamblocks_ops.surprise import METRICS


@final
class PredictionError:
    """Scores a token by the distance between its value and the memory's prediction of it.

    This is the gate of the HAM paper (arXiv 2603.22325). The layer passes `metric` to the memory,
    which computes the score and need not write the residual.
    """

    score_heads: ScoreHeads = "own"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __init__(self, metric: str = "cosine") -> None:
        """Makes the gate.

        Args:
            metric: "cosine", "relative_l2" or "l2" (see `hamblocks.ops.surprise`).

        Raises:
            ValueError: there is no such metric.
        """
        if metric not in METRICS:
            raise wrong("metric", f"one of {', '.join(METRICS)}", repr(metric))
        self.metric = metric

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns `trace.surprise(metric)`, `[B, T, H]`, float32 (or float64).

        Raises:
            ValueError: the layer has no memory, or the trace has neither the residual nor the score
                of this metric.
        """
        check_memory(self, trace)
        return GateOutput(trace.surprise(self.metric))

    def __repr__(self) -> str:
        return f"PredictionError({self.metric!r})"
