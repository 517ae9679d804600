"""RMSNorm of reads, queries and keys, which autocast must not narrow."""

from __future__ import annotations

from torch import Tensor, nn


def normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """norm(x) in the dtype of the norm's weight, which is wider than x under autocast."""
    y: Tensor = norm(x.to(norm.weight.dtype))
    return y
