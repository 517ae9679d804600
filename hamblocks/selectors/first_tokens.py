"""Stores the first tokens of a sequence."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.protocols import Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks_ops import select_first


@final
class FirstTokens(Composable):
    """Stores the first `n` tokens of each sequence for good (attention sinks, arXiv 2309.17453)."""

    ignores_score = True

    def __init__(self, n: int) -> None:
        """Makes the selector.

        Args:
            n: in tokens, >= 0.

        Raises:
            ValueError: `n` is no integer >= 0.
        """
        super().__init__()
        n = check_count("n", n)
        self.n = n

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        return Selection(select_first(score, self.n, position=position, cu_seqlens=cu_seqlens))
