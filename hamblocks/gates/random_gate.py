"""The control experiment: random scores."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.hashing import mix
from hamblocks.heads import ScoreHeads, shared_call
from hamblocks.protocols import GateOutput, MemoryTrace, check_count
from hamblocks_ops.arguments import wrong

PER = ("sequence", "position")
"""Values of `per`: what gets a score of its own."""
HEADS = ("shared", "own")
"""Values of `heads`: whether heads share a score."""
CONTENT_BITS = 16
"""Entries of x whose signs tell one token from another."""


@final
class RandomGate:
    """The control experiment: a score that is uniform in [0, 1) and says nothing of the token.

    The score is a hash, so it is the same in one pass, in several calls with a state, and in a
    packed batch:

    - `per="sequence"` hashes seed, position and the signs of the first 16 entries of x. Sequences
      with different tokens draw differently; two sequences draw the same score at a position where
      both have the same x. The index in the batch is not used, because decisions would then depend
      on the other sequences of the batch. Only the signs of x are used, because a rounding error
      changes the sign of an entry only if the entry is as small as that error.
    - `per="position"` hashes seed and position: all sequences draw the same, exactly, in any dtype.
      A model can learn to rely on the positions that are stored, so this is the weaker control.

    For scores that depend on nothing else, draw them outside and use `GivenScore`.

    Shared scores store a token for all heads or for none. With `heads="own"` every head draws for
    itself. Such a gate is no control at a small fraction: at 25 %, two heads in two layers together
    see 1 - 0.75^4 = 68 % of the tokens.
    """

    def __init__(self, seed: int = 0, *, per: str = "sequence", heads: str = "shared") -> None:
        """Makes the gate.

        Args:
            seed: its lowest 32 bits count. Layers with the same seed and `per="position"` draw the
                same scores.
            per: "sequence" or "position", see above.
            heads: "shared": one score per token; "own": one per query head. A layer averages the
                scores of the query heads of a key/value head, which are then no longer uniform.

        Raises:
            ValueError: `seed` is no integer >= 0, or there is no such `per` or `heads`.
        """
        seed = check_count("seed", seed)
        if per not in PER:
            raise wrong("per", f"one of {', '.join(PER)}", repr(per))
        if heads not in HEADS:
            raise wrong("heads", f"one of {', '.join(HEADS)}", repr(heads))
        self.seed, self.per, self.heads = seed, per, heads

    @property
    def score_heads(self) -> ScoreHeads:
        """See `hamblocks.heads.HasScoreHeads`."""
        return "one" if self.heads == "shared" else "own"

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, 1]`, or `[B, T, H]` with `heads="own"`, float32."""
        # the keys tell the number of heads; a layer without a memory has them too
        count = 1 if self.heads == "shared" else trace.k.shape[2]
        call = shared_call()
        first = 0 if call is None or self.heads == "shared" else call.share.rank * count
        heads = torch.arange(first, first + count, device=x.device)
        word = mix(mix(torch.full_like(heads, self.seed & 0xFFFFFFFF)) ^ heads)
        word = mix(word ^ trace.position.long()[..., None])
        if self.per == "sequence":
            signs = x.detach()[..., :CONTENT_BITS] > 0
            powers = 1 << torch.arange(signs.shape[-1], device=x.device)
            word = mix(word ^ (signs * powers).sum(-1, keepdim=True))
        # float32 holds 24 bits exactly
        return GateOutput((word >> 8).to(torch.float32) * 2.0**-24)

    def __repr__(self) -> str:
        return f"RandomGate({self.seed}, per={self.per!r}, heads={self.heads!r})"
