"""The models that the recall experiment compares. They differ in gate and controller alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hamblocks.attention import SelectedAttention
from hamblocks.experiments.stand_ins import AnnealedFraction, ElasticFraction
from hamblocks.experiments.tasks import Task
from hamblocks.gates import LearnedRouter, PredictionError, RandomGate, SharedGate
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.models import Decoder
from hamblocks.protocols import Controller, Gate
from hamblocks.selectors import Threshold
from hamblocks_ops.arguments import wrong

ARMS = ("everything", "memory", "surprise", "random", "router", "elastic")
"""What is stored: all, nothing, what the memory mispredicts, a random draw, what a router learned
to choose, and what the memory mispredicts at a budget that changes in every step."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model, and the start of its memory.

    Attributes:
        hidden_size: width.
        num_heads: heads of memory and attention.
        head_dim: size of a head; a memory holds about that many pairs per head.
        num_layers: layers.
        dt: softplus(dt_bias) at the start. With exp(A_log) = 1 the memory forgets e^-dt per token;
            0.0003 leaves it 0.63 of what it knew 1536 tokens ago.
    """

    hidden_size: int = 64
    num_heads: int = 1
    head_dim: int = 32
    num_layers: int = 1
    dt: float = 0.0003


def model_of(
    arm: str, task: Task, sizes: ModelSizes, *, seed: int, target: float, steps: int
) -> Decoder:
    """Makes the model of an arm.

    Attention has no rotary positions: the convolution over its keys says which token stood before,
    and no answer depends on a distance. One decision per token serves all heads of a layer.

    Args:
        arm: one of `ARMS`.
        task: tells the number of symbols.
        sizes: sizes.
        seed: of weights and random scores.
        target: fraction of the tokens that is stored in the end.
        steps: optimizer steps that the model will be trained; the target is reached after half of
            them.

    Raises:
        ValueError: there is no such arm.
    """
    if arm not in ARMS:
        raise wrong("arm", f"one of {', '.join(ARMS)}", repr(arm))
    torch.manual_seed(seed)

    def layer(index: int) -> HAMLayer:
        return HAMLayer(
            sizes.hidden_size,
            sizes.num_heads,
            head_dim=sizes.head_dim,
            memory=GatedDeltaMemory(2, A_init_range=(1.0, 1.0), dt_min=sizes.dt, dt_max=sizes.dt),
            gate=_gate(arm, seed + index),
            selector=Threshold(_threshold(arm, seed, target, steps)),
            attention=SelectedAttention(conv_size=2, rope_theta=None),
        )

    return Decoder(task.vocab_size, sizes.num_layers, layer)


def _gate(arm: str, seed: int) -> Gate:
    if arm == "random":
        return RandomGate(seed)
    if arm == "router":
        return SharedGate(LearnedRouter())
    return SharedGate(PredictionError("cosine"))


def _threshold(arm: str, seed: int, target: float, steps: int) -> Controller | float:
    if arm == "everything":
        return -math.inf
    if arm == "memory":
        return math.inf
    if arm == "elastic":
        return ElasticFraction(0.05, 1.0, seed=seed, begin=max(steps // 5, 1), spacing="uniform")
    return AnnealedFraction(target, max(steps // 2, 1))


def set_fraction(model: Decoder, fraction: float) -> None:
    """Moves the elastic controllers of a model to a budget.

    Raises:
        ValueError: the model has none.
    """
    found = [module for module in model.modules() if isinstance(module, ElasticFraction)]
    if not found:
        raise wrong("model", "one with an ElasticFraction", "none in it")
    for controller in found:
        controller.set_fraction(fraction)


def set_threshold(model: Decoder, tau: float) -> None:
    """Sets tau of the elastic controllers of a model."""
    for module in model.modules():
        if isinstance(module, ElasticFraction):
            module.set_threshold(tau)
