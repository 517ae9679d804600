"""Stores every token for a while."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.protocols import Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks_ops import select_window


@final
class Window(Composable):
    """Sliding window: a token is seen by itself and by the next `width - 1` queries."""

    ignores_score = True

    def __init__(self, width: int) -> None:
        """Makes the selector.

        Args:
            width: in tokens, >= 0; 0 stores nothing.

        Raises:
            ValueError: `width` is no integer >= 0.
        """
        super().__init__()
        width = check_count("width", width)
        self.width = width

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        return Selection(select_window(score, self.width, position=position, cu_seqlens=cu_seqlens))
