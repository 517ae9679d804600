"""A threshold that a given fraction of the tokens reaches."""

from __future__ import annotations

from typing import final

from hamblocks.controllers.pinball import TargetThreshold


@final
class TargetFraction(TargetThreshold):
    """Moves tau so that a fraction of the tokens reaches it (arXiv 2603.22325).

    Every optimizer step moves tau once (see `step_controllers`), along the gradient of the pinball
    loss, whose minimum is the (1 - fraction) quantile of the scores:

        tau += rate * spread * (admitted / seen - fraction)

    `admitted` of the `seen` scores since the last step reached tau. The spread is a running average
    of the scores' interquartile range, divided by that of a standard normal distribution. So the
    rate has no unit, and a few huge scores do not make the step huge.

    tau starts at -inf: until the first step everything is stored. If a step finds tau infinite, or
    the odds of reaching it off by more than a factor of 4, it sets tau by `threshold_between` from
    the scores of the last steps. So tau recovers from any initial value and follows scores that
    jump, and a target of 0 (tau = +inf) or 1 (tau = -inf) can be changed in training. Such a tau
    lies strictly between two scores, so no decision depends on how the last bit of a score was
    rounded.

    In eval mode nothing is counted and nothing moves. The fraction counts the tokens that this
    threshold admits, and not those that only a combined selector, such as `Window`, stores. Several
    layers may share one controller, and so one tau: the target then holds for all of them together,
    and the fraction of each layer may differ.
    """

    def __init__(self, fraction: float, *, rate: float = 1.0) -> None:
        """Makes the controller.

        Args:
            fraction: the target, in [0, 1].
            rate: step size in units of the scores' spread, finite and >= 0; with 0, tau stays where
                its first step places it.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__(fraction, rate)
