"""What a layer does to one token beside its projections, the recurrence and attention, in few kernels.

Each function has the result of the torch ops of the part that calls it, computed in float32 (float64
for float64 inputs) and rounded once. They have no gradient. `runs` says where they can be called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.dispatch import interpreted, transformed, without_triton

__all__ = [
    "DEVICES",
    "Convolution",
    "Heads",
    "Rotation",
    "decay_and_strength",
    "heads",
    "mix",
    "runs",
]


DEVICES = {"cuda"}
"""Types of devices on which parts ask for these kernels. On others they do not even ask."""


class Heads(NamedTuple):
    """The heads of queries, keys or values of one token, and what is done to them, in this order.

    Attributes:
        x: `[N, 1, H, D]`.
        repeat: every head is written this often, one after the other.
        channel: the first channel of the convolution; None: they are not convolved.
        silu: SiLU after the convolution.
        unit: norm to unit length.
        unit_eps: with `unit`, added to the squared length; 0: the length is at least 1e-12 instead.
        weight: `[D]` of an RMSNorm; None: none.
        eps: of the RMSNorm.
        turns: rotary positions.
    """

    x: Tensor
    repeat: int = 1
    channel: int | None = None
    silu: bool = False
    unit: bool = False
    unit_eps: float = 0.0
    weight: Tensor | None = None
    eps: float = 0.0
    turns: bool = False


class Convolution(NamedTuple):
    """A causal depthwise convolution over time.

    Attributes:
        weight: `[C, taps]`, the last tap weighs the token itself.
        state: `[N, taps - 1, C]`, the inputs before it, oldest first.
    """

    weight: Tensor
    state: Tensor


class Rotation(NamedTuple):
    """Rotary positions: channel i is turned with channel i + P, for each i below P.

    Attributes:
        position: int32 `[N, 1]`.
        frequency: float32 or float64 `[P]`, the angle of each pair per position.
        factor: multiplies cosine and sine.
    """

    position: Tensor
    frequency: Tensor
    factor: float = 1.0


def runs(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the functions of this module run on x and others, which are of one dtype and device.

    Not where a gradient is asked for, in a trace, or where torch transforms the function.
    """
    given = [x, *(one for one in others if one is not None)]
    return (
        not torch.compiler.is_compiling()
        and without_triton(x) is None
        and interpreted(x) is None
        and not transformed()
        and all(one.dtype == x.dtype and one.device == x.device for one in given)
        and all(type(one) in (Tensor, torch.nn.Parameter) for one in given)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
    )


def heads(
    parts: list[Heads], conv: Convolution | None = None, rotation: Rotation | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Convolution, SiLU, norms and rotary positions of one token, in one kernel.

    Args:
        parts: one to three.
        conv: the convolution of the parts with a `channel`.
        rotation: the rotary positions of the parts that turn.

    Returns:
        `[N, 1, H * repeat, D]` of each part, and the next state of the convolution.
    """
    from hamblocks_ops.decode.triton import launch_heads

    made: tuple[list[Tensor], Tensor | None] = launch_heads(parts[0].x, parts, conv, rotation)
    return made


def decay_and_strength(
    a: Tensor, a_log: Tensor, dt_bias: Tensor, b: Tensor, most: float
) -> tuple[Tensor, Tensor]:
    """Log decay and write strength of a gated delta rule, in one kernel.

    g = -exp(a_log) softplus(a + dt_bias) and beta = most * sigmoid(b).

    Args:
        a: `[..., H]`.
        a_log: `[H]`.
        dt_bias: `[H]`.
        b: `[..., H]`.
        most: the largest strength.

    Returns:
        g and beta, float32 or float64 `[..., H]`.
    """
    from hamblocks_ops.decode.triton import launch_decay

    made: tuple[Tensor, Tensor] = launch_decay(a, a_log, dt_bias, b, most)
    return made


def mix(
    reads: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    logits: Tensor,
    eps: float,
) -> Tensor:
    """The sum of two reads, each with an RMSNorm and a sigmoid gate per head, in one kernel.

    Args:
        reads: `[N, 1, H, D]` twice.
        norms: `[D]` each, the weights of the norms; None: no norm.
        logits: `[N, 2 * H]`, for each head the gates of both reads.
        eps: of the norms.

    Returns:
        `[N, 1, H * D]`.
    """
    from hamblocks_ops.decode.triton import launch_mix

    made: Tensor = launch_mix(reads[0], reads[1], norms, logits, eps)
    return made
