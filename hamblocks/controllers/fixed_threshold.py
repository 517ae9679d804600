"""A threshold that never moves."""

from __future__ import annotations

import numbers
from typing import cast, final

import torch
from torch import Tensor

from hamblocks.controllers.tau import HasTau, float32, number
from hamblocks.protocols import Controller
from hamblocks.reachable import is_controller
from hamblocks_ops.arguments import wrong


@final
class FixedThreshold(HasTau):
    """A threshold set by the user: -inf stores everything, +inf nothing."""

    ignores_score = True
    """Whatever the scores are, tau is the same: a selector need not mask padding for it."""

    def __init__(self, tau: float) -> None:
        """Makes the controller.

        Args:
            tau: the threshold, any number but NaN.

        Raises:
            ValueError: `tau` is NaN or no number.
        """
        initial = number("tau", tau)
        super().__init__(initial)
        self.initial_tau = initial

    @torch.no_grad()
    def reset(self) -> None:
        """Sets tau to the value that the controller was made with."""
        self._place(float32(self.initial_tau))

    def forward(self, score: Tensor) -> Tensor:
        """Returns tau, float32 `[]`, for any score."""
        return self.tau

    def step(self) -> None:
        """Does nothing: the threshold is fixed."""


def controller_of(given: Controller | float) -> Controller:
    """The controller that was given, or a fixed threshold for a number.

    Raises:
        ValueError: `given` is NaN, or neither a number nor a controller: nothing could step it.
    """
    if isinstance(given, numbers.Real):
        return FixedThreshold(cast("float", given))
    if not is_controller(given):
        expected = "a number or a Controller (called with a score, and with a method step())"
        raise wrong("controller", expected, given)
    return given
