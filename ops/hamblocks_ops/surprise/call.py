"""What an implementation of `surprise` is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = ("cosine", "relative_l2", "l2")


class SurpriseCall(NamedTuple):
    """One call of `surprise`: residual and v `[B, T, H, V]` of one dtype, and one of METRICS."""

    residual: Tensor
    v: Tensor
    metric: str
