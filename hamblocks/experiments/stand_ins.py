"""Parts that the experiments need and the library does not have yet. To be deleted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hamblocks.controllers import threshold_between


class _Sampled(nn.Module):
    """A threshold placed in the scores of the last training step."""

    tau: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(-math.inf))
        self.sample: Tensor | None = None
        self.taken = 0

    def aim(self) -> float:
        """The fraction of the next training step."""
        raise NotImplementedError

    def forward(self, score: Tensor) -> Tensor:
        """Returns tau; in training mode it remembers the scores."""
        if self.training:
            self.sample = score.detach().flatten()
        return self.tau

    @torch.no_grad()
    def step(self) -> None:
        """Places tau for the next step."""
        if self.training and self.sample is not None:
            self.taken += 1
            self.set_fraction(self.aim())

    @torch.no_grad()
    def set_fraction(self, fraction: float) -> None:
        """Places tau so that a fraction of the last scores reaches it."""
        assert self.sample is not None
        self.tau.copy_(threshold_between(self.sample, torch.tensor(fraction)))

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand."""
        self.tau.fill_(tau)


class AnnealedFraction(_Sampled):
    """Everything first, then linearly down to the fraction."""

    def __init__(self, fraction: float, steps: int) -> None:
        super().__init__()
        self.fraction, self.steps = fraction, steps

    def aim(self) -> float:
        """Falls from 1 to the fraction in `steps` steps."""
        return 1 - (1 - self.fraction) * min(self.taken / self.steps, 1)

    @torch.no_grad()
    def step(self) -> None:
        """Places tau anew while the target moves; afterwards moves it a third of the way."""
        before = self.tau.clone()
        super().step()
        if self.taken > self.steps:
            self.tau.copy_(before.lerp(self.tau, 0.3))


class ElasticFraction(_Sampled):
    """A fraction drawn in every step, after `begin` steps with everything."""

    def __init__(
        self,
        low: float = 0.05,
        high: float = 1.0,
        *,
        seed: int = 0,
        begin: int = 0,
        spacing: str = "log_uniform",
    ) -> None:
        super().__init__()
        self.low, self.high, self.begin, self.spacing = low, high, begin, spacing
        self.generator = torch.Generator().manual_seed(seed)

    def aim(self) -> float:
        """Uniform or log-uniform in [low, high)."""
        share = float(torch.rand((), generator=self.generator))
        if self.taken < self.begin:
            return 1.0
        if self.spacing == "uniform":
            return self.low + (self.high - self.low) * share
        return float(self.low * (self.high / self.low) ** share)
