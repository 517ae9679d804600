"""Scores that the caller of the layer hands in."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.heads import ScoreHeads
from hamblocks.protocols import GateOutput, MemoryTrace
from hamblocks_ops.arguments import wrong


@final
class GivenScore:
    """Scores a token by what the caller says: `layer(x, given_score=score)`.

    The score may be anything: labels that say which tokens will be asked for, for an upper bound of
    what routing can reach (an oracle); the entropy or the loss of another model; random numbers of
    a generator. The gate needs no memory.
    """

    score_heads: ScoreHeads = "given"
    """See `hamblocks.heads.HasScoreHeads`."""

    reads_given: bool = True
    """The layer must be called with `given_score`."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns `trace.given`, `[B, T, heads]` or `[B, T, 1]`, as float32 or wider.

        Raises:
            ValueError: the layer was called without `given_score`.
        """
        if trace.given is None:
            raise wrong(
                "given_score", "a score [B, T, 1 or heads], for the gate GivenScore", "None"
            )
        given = trace.given.detach()
        return GateOutput(given.to(torch.promote_types(given.dtype, torch.float32)))

    def __repr__(self) -> str:
        return "GivenScore()"
