"""Gradients of weights that a call does not use, because of what its input holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def with_zero_gradients(y: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """y, from whose backward pass weights get the gradient 0.

    A call without tokens calls no part, and one in which no query reads does not run attention.
    Without this the weights of those parts would have no gradient there, and one on other ranks.
    But FSDP2 and `DistributedDataParallel` reduce the gradients that a rank has in one exchange,
    which must be of equal size on all of them.

    Args:
        y: a floating tensor.
        weights: the weights; those that need no gradient are left out.
    """
    if not torch.is_grad_enabled():  # in decoding no weight needs a gradient
        return y
    # the sum of nothing is 0 even where a weight is not finite
    zeros = [weight.flatten()[:0].sum().to(y) for weight in weights if weight.requires_grad]
    return y + sum(zeros) if zeros else y
