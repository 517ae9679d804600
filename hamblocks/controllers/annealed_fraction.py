"""A target fraction that begins at everything and falls to its end."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.controllers.pinball import TargetThreshold
from hamblocks.controllers.tau import float32, unit
from hamblocks.protocols import check_count


@final
class AnnealedFraction(TargetThreshold):
    """A `TargetFraction` whose target moves: everything first, then linearly to the fraction.

    After t optimizer steps that saw scores the target is

        start + (fraction - start) * clamp((t - begin) / steps, 0, 1)

    While the target moves, every step places tau by `threshold_between` in the scores of the last
    steps, because the steps of `TargetFraction` follow a moving target with a lag. Afterwards tau
    moves as that of a `TargetFraction`, until it is frozen: by `freeze()`, or after `freeze_at`
    steps.
    """

    taken: Tensor

    def __init__(
        self,
        fraction: float,
        steps: int,
        *,
        start: float = 1.0,
        begin: int = 0,
        rate: float = 1.0,
        freeze_at: int | None = None,
    ) -> None:
        """Makes the controller.

        Args:
            fraction: the last target, in [0, 1].
            steps: optimizer steps from the first target to the last, >= 1.
            start: the first target, in [0, 1].
            begin: optimizer steps before the target moves, >= 0.
            rate: step size of tau after the target has moved, as in `TargetFraction`.
            freeze_at: optimizer steps after which tau stays where it is, >= 1; None: never.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__(fraction, rate, taken=float32(0))
        self.start = unit("start", start)
        self.steps = check_count("steps", steps, 1)
        self.begin = check_count("begin", begin)
        self.freeze_at = None if freeze_at is None else check_count("freeze_at", freeze_at, 1)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets everything to what it was when the controller was made: no score was seen."""
        super().reset()
        self.taken.zero_()

    def _aim(self) -> Tensor:
        progress = ((self.taken - self.begin) / self.steps).clamp(0, 1)
        return torch.full_like(self.target, self.start).lerp(self.target, progress)

    def _is_placed_anew(self) -> Tensor:
        return self.taken <= self.begin + self.steps

    def _move(self, share: Tensor, counted: Tensor, asked: Tensor) -> None:
        self.taken.add_(counted)
        super()._move(share, counted, asked)

    def _may_move(self, counted: Tensor) -> Tensor:
        may = super()._may_move(counted)
        return may if self.freeze_at is None else may & (self.taken <= self.freeze_at)

    def extra_repr(self) -> str:
        """Targets, steps and threshold."""
        return f"{super().extra_repr()}, steps={self.steps}, start={self.start:g}"
