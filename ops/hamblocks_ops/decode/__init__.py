"""Triton kernels that fuse the small ops of a layer for one decoded token.

Projections, recurrence and attention are not among them. Each function computes the same as the
torch ops of the part that calls it, in float32 (float64 for float64 inputs), rounded once. They
have no gradient. `runs` says where they can be called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.decode.call import Convolution, Heads, Rotation
from hamblocks_ops.dispatch import interpreted, transformed, without_triton

__all__ = [
    "DEVICES",
    "Convolution",
    "Heads",
    "Rotation",
    "compete",
    "decay_and_strength",
    "heads",
    "mix",
    "runs",
]


DEVICES = {"cuda"}
"""Types of devices that have these kernels. On others parts skip the check `runs`."""


def runs(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the functions of this module run on x and others.

    True for plain tensors of one dtype and device that Triton supports. False where a gradient is
    needed, under `torch.compile` and in transforms of `torch.func`.
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
        conv: the convolution of the parts with a `channel`; None: no part has one.
        rotation: the rotary positions of the parts with `turns`; None: no part has it.

    Returns:
        `[N, 1, H * repeat, D]` of each part, and the next state of the convolution, or None.
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


def compete(
    score: Tensor, new: Tensor, position: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token competes with the k best so far, in one kernel.

    Of the k + 1 tokens the one with the smallest score leaves; of equal scores the latest. A score
    of NaN counts as -inf.

    Args:
        score: `[N, 1, H]`, of the new tokens.
        new: int32 `[N, 1, H]`, their positions; -1 for those that do not compete.
        position: int32 `[N, k, H]`, ascending, -1 for empty slots, which come first; k >= 1.
        scores: `[N, k, H]`, in the dtype of `score`; 0 for empty slots.

    Returns:
        Lifetimes of the new tokens and of those in the slots, int32, and the slots after it: their
        positions and scores.
    """
    from hamblocks_ops.decode.triton import launch_compete

    made: tuple[Tensor, Tensor, Tensor, Tensor] = launch_compete(score, new, position, scores)
    return made
