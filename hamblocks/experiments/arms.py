"""The arms of the recall demo: models that differ in what they store."""

from __future__ import annotations

import math
from functools import partial

from hamblocks.controllers import AnnealedFraction, ElasticFraction
from hamblocks.decoder import Decoder
from hamblocks.experiments.models import POLICIES, LayerOptions, model_of
from hamblocks.experiments.tasks import Task
from hamblocks.protocols import Controller
from hamblocks_ops.arguments import wrong

ARMS = ("everything", "memory", "surprise", "random", "router", "elastic")
"""What is stored: all, nothing, what the memory mispredicts, a random draw, what a router learned
to choose, and what the memory mispredicts at a budget that changes in every step."""


def arm_of(
    arm: str, task: Task, options: LayerOptions, *, seed: int, target: float, steps: int
) -> Decoder:
    """Makes the model of an arm.

    Args:
        arm: one of `ARMS`.
        task: tells the number of symbols.
        options: what its layers are made of.
        seed: of weights and random scores.
        target: fraction of the tokens that is stored in the end.
        steps: optimizer steps that the model will be trained; the target is reached after half of
            them.

    Raises:
        ValueError: there is no such arm.
    """
    if arm not in ARMS:
        raise wrong("arm", f"one of {', '.join(ARMS)}", repr(arm))
    gate = POLICIES.get(arm, POLICIES["surprise"])
    return model_of(task, options, gate, partial(_threshold, arm, seed, target, steps), seed=seed)


def _threshold(arm: str, seed: int, target: float, steps: int) -> Controller | float:
    if arm == "everything":
        return -math.inf
    if arm == "memory":
        return math.inf
    if arm == "elastic":
        return ElasticFraction(0.05, 1.0, seed=seed, begin=max(steps // 5, 1), spacing="uniform")
    return AnnealedFraction(target, max(steps // 2, 1), rate=0.3)
