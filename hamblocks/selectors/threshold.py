"""Stores what reaches a threshold."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.controllers import controller_of
from hamblocks.ledger import EMPTY
from hamblocks.protocols import Controller, Selection
from hamblocks.selectors.combined import Composable
from hamblocks_ops import select_threshold


@final
class Threshold(Composable):
    """Stores a token for good if its score reaches tau (arXiv 2603.22325).

    `evict_at` is NEVER where `score >= tau` and `tau < inf`, elsewhere the token's own position.
    """

    controller: Controller

    def __init__(self, controller: Controller | float) -> None:
        """Makes the selector.

        Args:
            controller: sets tau: a `hamblocks.protocols.Controller`, or a number for a fixed tau.

        Raises:
            ValueError: `controller` is NaN, or neither a number nor a controller: nothing could
                step it.
        """
        super().__init__()
        self.controller = controller_of(controller)

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`. The controller gets NaN as the score of padding."""
        real = score
        if position is not None and not getattr(self.controller, "ignores_score", False):
            real = score.masked_fill(position[..., None] == EMPTY, float("nan"))
        tau = self.controller(real)
        return Selection(select_threshold(score, tau, position=position, cu_seqlens=cu_seqlens))
