"""The dtype that sums, states and angles are kept in, and tensors without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for every narrower x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def detached(x: Tensor) -> Tensor:
    """x without a gradient; x itself, without another op, where it has none."""
    return x.detach() if x.requires_grad else x
