"""Tokens with a large value change what attention reads."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.requirements import stored_of
from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace


@final
class ValueNorm:
    r"""Scores a token by the norm of its value: \(\lvert v_t \rvert\).

    What a query reads of a token is its attention weight times its value. Guo et al.
    (arXiv 2406.12335) therefore multiply the weight by the norm of the value. A new token has no
    attention weight yet, so this score is the norm alone. The norm is that of the value as
    attention stores it. The gate needs no memory.
    """

    score_heads: ScoreHeads = "own"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, Hkv]`, float32 (or float64), at least 0.

        Raises:
            ValueError: the trace has no stored values.
        """
        return GateOutput(stored_of(self, trace).v.norm(dim=-1))

    def __repr__(self) -> str:
        return "ValueNorm()"
