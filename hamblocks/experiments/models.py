"""The models of the experiments: what a layer is made of, and the gates that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hamblocks.attention import SelectedAttention
from hamblocks.controllers import ElasticFraction
from hamblocks.decoder import Decoder
from hamblocks.experiments.gates import EvenlySpaced
from hamblocks.experiments.tasks import Task
from hamblocks.gates import (
    CommittedWrite,
    GivenScore,
    LearnedRouter,
    PredictionError,
    RandomGate,
    SharedGate,
)
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.protocols import Controller, Gate
from hamblocks.selectors import Threshold
from hamblocks_ops.arguments import wrong

POLICIES: dict[str, Callable[[int], Gate]] = {
    "surprise": lambda _seed: SharedGate(PredictionError("cosine")),
    "committed write": lambda _seed: SharedGate(CommittedWrite()),
    "random": RandomGate,
    "periodic": lambda _seed: EvenlySpaced(),
    "router": lambda _seed: SharedGate(LearnedRouter()),
    "router, straight-through": lambda _seed: SharedGate(
        LearnedRouter(gradient="straight_through")
    ),
    "oracle": lambda _seed: GivenScore(),
}
"""What is stored where not everything is: the gates, each made for a layer by its seed."""


@dataclass(frozen=True)
class LayerOptions:
    """What a layer is made of.

    Attributes:
        hidden_size, num_heads, head_dim, num_layers: sizes.
        key_taps: taps of the convolution over attention's keys; 1: none.
        memory_taps: taps of the memory's convolution.
        dt: the memory forgets e^-dt of what it knows per token at the start; None: as it comes,
            between e^-0.001 and e^-1.6.
        shared: one decision per token for all heads of a layer.
        own: projections of the memory's own.
        rope: rotary positions. Without them the convolution over keys says which token stood
            before, and no answer depends on a distance.
        null_sink: a query may read nothing.
        annealed: the budget falls from everything to the target in the first half of the training;
            False: it is the target from the start.
    """

    hidden_size: int = 64
    num_heads: int = 1
    head_dim: int = 32
    num_layers: int = 1
    key_taps: int = 2
    memory_taps: int = 2
    dt: float | None = 0.0003
    shared: bool = True
    own: bool = False
    rope: bool = False
    null_sink: bool = False
    annealed: bool = True

    def layer(self, gate: Gate, controller: Controller | float) -> HAMLayer:
        """A layer with these options."""
        decay: dict[str, Any] = {}
        if self.dt is not None:
            decay = {"A_init_range": (1.0, 1.0), "dt_min": self.dt, "dt_max": self.dt}
        return HAMLayer(
            self.hidden_size,
            self.num_heads,
            head_dim=self.head_dim,
            memory=GatedDeltaMemory(
                self.memory_taps, projections="own" if self.own else "shared", **decay
            ),
            gate=gate,
            selector=Threshold(controller),
            attention=SelectedAttention(
                conv_size=self.key_taps,
                rope_theta=10_000.0 if self.rope else None,
                null_sink=self.null_sink,
            ),
        )


def model_of(
    task: Task,
    options: LayerOptions,
    gate: Callable[[int], Gate],
    controller: Callable[[], Controller | float],
    *,
    seed: int,
) -> Decoder:
    """Makes a model.

    Args:
        task: tells the number of symbols.
        options: what its layers are made of.
        gate: makes the gate of a layer, from a seed.
        controller: makes the controller of a layer.
        seed: of weights and random scores.
    """
    torch.manual_seed(seed)
    return Decoder(
        task.vocab_size,
        options.num_layers,
        lambda index: options.layer(gate(seed + index), controller()),
    )


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


def set_threshold(model: nn.Module, tau: float) -> None:
    """Sets tau of the elastic controllers of a model or layer."""
    for module in model.modules():
        if isinstance(module, ElasticFraction):
            module.set_threshold(tau)
