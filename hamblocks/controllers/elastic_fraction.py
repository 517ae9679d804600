"""A fraction that is drawn anew in every training step."""

from __future__ import annotations

import math
from typing import Literal, final, get_args

import torch
from torch import Tensor

from hamblocks.controllers.quantiles import between, ordered, threshold_between
from hamblocks.controllers.sampled import SampledThreshold
from hamblocks.controllers.tau import float32, sum_and_weight, unit
from hamblocks.hashing import mix, unit_hash
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong

Spacing = Literal["log_uniform", "uniform"]


@final
class ElasticFraction(SampledThreshold):
    """Trains with a fraction that is drawn in every step, so that one model works with any budget.

    After t optimizer steps that saw scores, training uses

        tau = threshold_between(sample, f(t)),    f(t) = low * (high / low)^u(seed, t)

    with the scores of the last steps as the sample and u in [0, 1) a hash of seed and t: every rank
    and every restart draws the same fraction, and so do all layers whose controllers have the same
    seed. `spacing="uniform"` draws f(t) = low + (high - low) * u. Before the first step, and for
    `begin` steps, everything is stored.

    In eval mode tau is the one that `set_fraction` or `set_threshold` sets; initially it is that of
    the fraction `high`. A tau of `set_fraction` is computed again from the sample after every
    training step.
    """

    drawn_sum: Tensor
    drawn_weight: Tensor
    used: Tensor
    by_hand: Tensor
    taken: Tensor

    def __init__(
        self,
        low: float = 0.05,
        high: float = 1.0,
        *,
        seed: int = 0,
        begin: int = 0,
        spacing: Spacing = "log_uniform",
    ) -> None:
        """Makes the controller.

        Args:
            low: the smallest fraction, in [0, 1]; > 0 for "log_uniform".
            high: the largest fraction, in [low, 1].
            seed: of the hash, >= 0; its lowest 32 bits count.
            begin: optimizer steps before the first draw, >= 0.
            spacing: "log_uniform" or "uniform", the distribution of the fraction.

        Raises:
            ValueError: a number is out of range, or `spacing` is neither.
        """
        if spacing not in get_args(Spacing):
            raise wrong("spacing", " or ".join(get_args(Spacing)), repr(spacing))
        low, high = unit("low", low), unit("high", high)
        if not low <= high:
            raise wrong("high", f"a number in [low, 1] with low = {low}", str(high))
        if low == 0 and spacing == "log_uniform":
            raise wrong("low", "a number > 0 for log_uniform", str(low))
        drawn_sum, drawn_weight = sum_and_weight(float32(-math.inf))
        super().__init__(
            drawn_sum=drawn_sum,
            drawn_weight=drawn_weight,
            used=float32(high),
            by_hand=float32(0),
            taken=float32(0),
        )
        self.low, self.high = low, high
        self.seed = check_count("seed", seed)
        self.begin = check_count("begin", begin)
        self.spacing: Spacing = spacing

    @property
    def tau(self) -> Tensor:
        """The threshold, float32 `[]`: the drawn one in training mode, in eval mode the set one."""
        return self.drawn_sum / self.drawn_weight if self.training else self._held()

    @torch.no_grad()
    def reset(self) -> None:
        """Sets everything to what it was when the controller was made: no score was seen."""
        super().reset()
        self._draw(float32(-math.inf))
        self.used.fill_(self.high)
        self.by_hand.zero_()
        self.taken.zero_()

    @torch.no_grad()
    def drawn_fraction(self) -> Tensor:
        """The fraction of the next forward pass in training mode, float32 `[]`; 1 is everything."""
        # in an averaged model this count is a mean, which need not be an integer
        word = self.taken.round().long()
        share = unit_hash(mix(torch.full_like(word, self.seed & 0xFFFFFFFF)) ^ word)
        if self.spacing == "uniform":
            drawn = self.low + (self.high - self.low) * share
        else:
            drawn = self.low * (self.high / self.low) ** share
        is_drawn = (self.taken >= self.begin) & self.started
        return torch.where(is_drawn, drawn, 1.0).float()

    def _draw(self, tau: Tensor) -> None:
        for buffer, value in zip(
            (self.drawn_sum, self.drawn_weight), sum_and_weight(tau), strict=True
        ):
            buffer.copy_(value)

    def _move(self, share: Tensor, counted: Tensor, asked: Tensor) -> None:
        self.taken.add_(counted)
        moves, sample = self._may_move(counted), ordered(self.sample)
        drawn = between(sample, self.drawn_fraction())
        self._draw(torch.where(moves, drawn, self.drawn_sum / self.drawn_weight))
        held = self._held()
        set_anew = moves & (self.by_hand < 0.5)
        self._place(torch.where(set_anew, between(sample, self.used), held))

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets the tau of eval mode by hand; training does not move it.

        Raises:
            ValueError: `tau` is NaN or no number, or the buffers are offloaded.
        """
        super().set_threshold(tau)
        self.by_hand.fill_(1)

    @torch.no_grad()
    def set_fraction(self, fraction: float) -> None:
        """Moves a trained model along the trade-off between quality and cache, in eval mode.

        Sets tau to `threshold_between(sample, fraction)` of the scores of the last training steps.
        0 gives tau = +inf and 1 gives tau = -inf, exactly. Before the first step there is no
        sample, and a fraction > 0 stores everything.

        Raises:
            ValueError: `fraction` is outside [0, 1], or the buffers are offloaded.
        """
        fraction = unit("fraction", fraction)
        self._check_in_memory()
        self.used.fill_(fraction)
        self.by_hand.zero_()
        self._place(threshold_between(self.sample, self.used))

    def extra_repr(self) -> str:
        """Bounds, seed and threshold."""
        return f"{self.low:g}, {self.high:g}, seed={self.seed}, {super().extra_repr()}"
