"""What the kernels of a decoded token are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
