"""RMSNorm of reads, queries and keys, computed in the dtype of its weight even under autocast."""

from __future__ import annotations

from torch import Tensor, nn


def normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """norm(x), with x cast to the dtype of the weight first; under autocast x is narrower."""
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y
