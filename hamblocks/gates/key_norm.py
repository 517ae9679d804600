"""Keys with a small norm get much attention."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.gates.requirements import stored_of
from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace


@final
class KeyNorm:
    r"""Scores a token by the norm of its key: \(-\lvert k_t \rvert\).

    In pretrained decoders, keys with a small L2 norm get much attention (Devoto et al.,
    arXiv 2406.11430), so the smallest norms score highest. The norm is that of the key as attention
    stores it. Rotary positions do not change the order of norms. With the default
    `SelectedAttention(qk_norm=True)` all keys are about equally long, and the score says little.
    The gate needs no memory.
    """

    score_heads: ScoreHeads = "own"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, Hkv]`, float32 (or float64), at most 0.

        Raises:
            ValueError: the trace has no stored keys.
        """
        return GateOutput(-stored_of(self, trace).k.norm(dim=-1))

    def __repr__(self) -> str:
        return "KeyNorm()"
