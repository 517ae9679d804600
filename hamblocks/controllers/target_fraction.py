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
    of the scores' interquartile range over that of a standard normal, so the rate has no unit and a
    few huge scores do not make the step huge.

    tau starts at -inf: until the first step everything is stored. A step that finds tau infinite,
    or far from where it belongs, places it by `threshold_between` in the scores of the last steps.
    Far means that the odds of reaching tau are off by a factor of 4. So tau comes from any start,
    follows scores that jump, and a target of 0 (tau = +inf) or 1 (tau = -inf) can be changed in
    training. A threshold that is placed stands strictly between two scores, so that no decision
    depends on how the last bit of a score was rounded.

    In eval mode nothing is counted and nothing moves. The fraction is what this threshold admits,
    whatever a selector combines it with. One controller may serve several layers, which then have
    one tau for all of them: the target is that of the whole model, and the layers are free to
    differ.
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
