"""Merging softmax attention over parts of the keys by their log-sum-exp.

Attention over the keys A and B together is a mean of attention over A and over B, weighted by
exp(lse_A) and exp(lse_B), and its own lse is log(exp(lse_A) + exp(lse_B)). Every implementation on
plain torch that reads keys in parts merges them here; kernels do the same in
`tiles.attention.softmax_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """Merges one more part into `out` in place, and returns the lse of both.

    Args:
        out: `[..., D]`, float32 or float64; it is overwritten.
        lse: `[...]`; -inf or a huge negative number where nothing was seen.
        more: `[..., D]`, the other part.
        more_lse: `[...]`, as lse.
    """
    total = torch.logaddexp(lse, more_lse)
    # where neither part saw anything: -inf - -inf would be NaN
    base = total.masked_fill(total == float("-inf"), 0)
    out.mul_((lse - base).exp_()[..., None]).addcmul_(more, (more_lse - base).exp_()[..., None])
    return total


def merge_all(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges all parts of a dimension at once.

    Args:
        out: `[R, M, ..., D]`, M parts; it is overwritten.
        lse: `[R, M, ...]`, -inf where a part saw nothing and has out = 0.

    Returns:
        out `[R, ..., D]` and lse `[R, ...]`; 0 and -inf where no part saw anything.
    """
    # Where no part saw anything, the softmax of -inf would be NaN. That of equal numbers is not, and
    # what it weights is 0.
    weight = lse.clamp(min=torch.finfo(lse.dtype).min).softmax(1)
    return out.mul_(weight[..., None]).sum(1), lse.logsumexp(1)
