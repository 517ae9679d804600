"""Stores the largest scores so far."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, TopKLedger, last_slots, new_positions
from hamblocks.protocols import Lifetimes, Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks_ops import NEVER, select_topk
from hamblocks_ops.arguments import wrong


@final
class TopK(Composable):
    """Stores the `k` largest scores seen so far.

    The smallest leaves when a larger one comes. Of equal scores the earlier token stays.
    """

    def __init__(self, k: int) -> None:
        """Makes the selector.

        Args:
            k: tokens stored per sequence and head, >= 0.

        Raises:
            ValueError: `k` is no integer >= 0.
        """
        super().__init__()
        check_count("k", k)
        self.k = k

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """The empty ledger: `k` empty slots per sequence and head."""
        position = torch.full((batch_size, self.k, heads), EMPTY, dtype=torch.int32, device=device)
        return TopKLedger(position, torch.zeros(position.shape, device=device))

    def forward(
        self,
        score: Tensor,
        ledger: TopKLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        if ledger is None:
            return Selection(select_topk(score, self.k, position=position, cu_seqlens=cu_seqlens))
        new = new_positions(score, position, cu_seqlens)
        slots = ledger.position.shape[1]
        if slots != self.k:
            raise wrong("ledger", f"one of k = {self.k} tokens", f"one of {slots}")
        # The stored tokens compete with the new ones as if all of them came in one sequence.
        where = torch.cat([ledger.position, new], 1)
        # A ledger starts in float32. Scores of a wider dtype widen it, which changes no comparison.
        dtype = torch.promote_types(score.dtype, ledger.score.dtype)
        scores = torch.cat([ledger.score.to(dtype), score.to(dtype)], 1)
        evict_at = select_topk(scores, self.k, position=where)
        kept = last_slots(evict_at == NEVER, self.k)
        return Selection(
            evict_at=evict_at[:, self.k :],
            lowered=Lifetimes(ledger.position, evict_at[:, : self.k]),
            ledger=TopKLedger(kept.take(where, EMPTY), kept.take(scores, 0)),
        )
