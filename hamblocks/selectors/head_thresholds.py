"""Stores what reaches the threshold of its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from hamblocks.controllers.tau import number
from hamblocks.heads import shared_call
from hamblocks.protocols import Selection
from hamblocks.selectors.combined import Composable
from hamblocks_ops import select_threshold
from hamblocks_ops.arguments import wrong


@final
class HeadThresholds(Composable):
    """Stores a token for good if its score reaches the threshold of its key/value head.

    Heads may thus have budgets of their own: a head with -inf stores everything, as retrieval heads
    need (DuoAttention, arXiv 2410.10819), and one with +inf stores nothing.

        HeadThresholds([-inf, 0.9]) | Window(64) | FirstTokens(4)
    """

    def __init__(self, taus: Sequence[float]) -> None:
        """Makes the selector.

        Args:
            taus: one number for each head that decides, not NaN; a single one serves any number of
                heads.

        Raises:
            ValueError: `taus` is empty, or holds NaN or something that is no number.
        """
        super().__init__()
        if not isinstance(taus, Sequence) or isinstance(taus, str) or not taus:
            raise wrong("taus", "a list of one or more numbers", taus)
        self.taus = [number(f"taus[{place}]", tau) for place, tau in enumerate(taus)]

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`.

        Raises:
            ValueError: the score has another number of heads than there are thresholds.
        """
        taus, call = self.taus, shared_call()
        if call is not None and not call.one_score and len(taus) > 1:
            taus = taus[call.share.own(len(taus))]
        heads = len(taus)
        if heads != 1 and heads != score.shape[2]:
            got = f"{score.shape[2]} (a gate that scores for all heads together has one)"
            raise wrong("score", f"{heads} heads, one for each of taus", got)
        # filled on the device: a copy from the host cannot be captured in a CUDA graph
        tau = torch.cat([score.new_full((1,), tau, dtype=torch.float32) for tau in taus])
        return Selection(select_threshold(score, tau, position=position, cu_seqlens=cu_seqlens))
