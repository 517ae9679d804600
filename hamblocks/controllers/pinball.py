"""The rule that moves a threshold towards a target fraction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hamblocks.controllers.quantiles import between, ordered, spread, threshold_between
from hamblocks.controllers.sampled import SampledThreshold
from hamblocks.controllers.tau import float32, number, shortest, unit

FAR = 4
"""If the odds of reaching tau in the sample are off by more than this factor, tau is replaced by a
quantile of the sample."""


class TargetThreshold(SampledThreshold):
    """Moves tau towards the fraction that `_aim` says, along the gradient of the pinball loss."""

    target: Tensor
    spread: Tensor

    def __init__(self, fraction: float, rate: float, **buffers: Tensor) -> None:
        fraction = unit("fraction", fraction)
        if not 0 <= number("rate", rate) < math.inf:
            raise ValueError(f"rate: expected a finite number >= 0, got {rate}")
        super().__init__(target=float32(fraction), spread=float32(0), **buffers)
        self.rate = float(rate)
        self.initial_fraction = fraction

    @property
    def fraction(self) -> float:
        """The target of training. It is a float32 buffer, so it is saved with the weights."""
        return shortest(self.target)

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self.target.fill_(unit("fraction", fraction))

    @torch.no_grad()
    def reset(self) -> None:
        """Sets everything to what it was when the controller was made: no score was seen."""
        super().reset()
        self.target.fill_(self.initial_fraction)
        self.spread.zero_()

    def _aim(self) -> Tensor:
        """The fraction that this step moves tau towards, float32 `[]`."""
        return self.target

    def _move(self, share: Tensor, counted: Tensor, asked: Tensor) -> None:
        target = self._aim()
        sample = ordered(self.sample)
        quantile = between(sample, target)
        anew = self.tau.isinf() | asked | self._is_placed_anew()
        if self.rate > 0:
            anew = anew | _is_far(self.tau, quantile, sample, target.double())
        now = spread(sample)
        average = torch.where(anew | (self.spread == 0), now, self.spread.lerp(now, 0.1))
        self.spread.copy_(torch.where(counted, average, self.spread))
        # in float64, where the product of a large rate and a large spread is finite
        moved = (self.tau + self.rate * (self.spread.double() * (share - target))).float()
        moved = torch.where(anew, quantile, moved)
        self._place(torch.where(self._may_move(counted), moved, self.tau))

    def _is_placed_anew(self) -> bool | Tensor:
        """Whether this step sets tau to a quantile of the sample, wherever tau is."""
        return False

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand. Training moves it on from there, or replaces it if it is far off.

        Raises:
            ValueError: `tau` is NaN or no number, or the buffers are offloaded.
        """
        super().set_threshold(tau)
        self.asked.zero_()

    @torch.no_grad()
    def set_fraction(self, fraction: float) -> None:
        """Moves a trained model along the trade-off between quality and cache.

        Sets tau to `threshold_between(sample, fraction)` of the scores of the last training steps.
        0 gives tau = +inf and 1 gives tau = -inf, exactly. The target of training, `fraction`,
        stays: if training goes on, its next step places tau at the target again.

        Before the first step there is no sample. The fraction then becomes the target, and
        everything is stored until the first step.

        Raises:
            ValueError: `fraction` is outside [0, 1], or the buffers are offloaded.
        """
        fraction = unit("fraction", fraction)
        self._check_in_memory()
        if not bool(self.started):
            self.fraction = fraction
            return
        self._place(threshold_between(self.sample, torch.full_like(self.target, fraction)))
        self.asked.fill_(1)

    def extra_repr(self) -> str:
        """Target, rate and threshold."""
        tau = super().extra_repr()
        return f"{self.fraction:g}, rate={self.rate:g}, {tau}" if tau else f"rate={self.rate:g}"


def _is_far(tau: Tensor, quantile: Tensor, sample: Tensor, target: Tensor) -> Tensor:
    """Whether the odds of reaching tau are off by more than `FAR`, and those of the quantile not.

    Where many scores are equal, no threshold may admit the target, and tau goes from one side of
    them to the other. So the quantile must also be less than half as far from the target as tau.
    """
    share, nearest = ((sample >= one).double().mean() for one in (tau, quantile))
    reach, refuse = share * (1 - target), (1 - share) * target
    is_off = (reach > FAR * refuse) | (refuse > FAR * reach)
    return is_off & (2 * (nearest - target).abs() < (share - target).abs())
