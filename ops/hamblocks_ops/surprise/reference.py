"""How far the prediction p = v - r missed the value v, for each token and head, always finite.

    cosine       1 - cos(p, v)     1 with gradient 0 where p or v is zero: the angle is not defined
    relative_l2  |r| / |v|         1 with gradient 0 where v is zero
    l2           |r|^2 / V

Vectors are scaled by their largest entry first, so that no square over- or underflows. A vector
whose largest entry is below the smallest normal number counts as zero. Results above the largest
finite number are clamped to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hamblocks_ops.precision import wide
from hamblocks_ops.surprise.call import SurpriseCall

ENTRIES = 2**16
"""Entries of v that are scored together on a CPU, so that intermediate results fit its cache."""


def run(call: SurpriseCall) -> Tensor:
    """Scores a call in float32, or float64 for float64 inputs."""
    dtype, v = wide(call.v), call.v
    residual = call.residual.to(dtype)
    if v.device.type != "cpu" or torch.compiler.is_compiling() or v.numel() <= ENTRIES:
        return reference(residual, v.to(dtype), call.metric)
    # token by token in any case, so that pieces give the same bits
    tokens = max(1, ENTRIES * v.shape[1] // v.numel())
    pieces = zip(residual.split(tokens, 1), v.to(dtype).split(tokens, 1), strict=True)
    return torch.cat([reference(*piece, call.metric) for piece in pieces], 1)


def reference(residual: Tensor, v: Tensor, metric: str) -> Tensor:
    """`[..., V]` twice, float32 or float64 -> `[...]`."""
    most = torch.finfo(v.dtype).max
    if metric == "cosine":
        return _cosine(torch.stack([v - residual, v]))
    if metric == "relative_l2":
        error, value = _Scaled(residual), _Scaled(v)
        lead = error.peak / value.peak
        over = lead.isinf()  # kept out of the product, whose gradient would be 0 * inf
        ratio = lead.masked_fill(over, 0) * (error.norm / value.norm)
        ratio = ratio.masked_fill(error.zero, 0).clamp(max=most).masked_fill(over, most)
        return ratio.masked_fill(value.zero, 1)
    # divided before it is squared: a mean in range has a sum that may not be
    scaled: Tensor = residual * residual.shape[-1] ** -0.5
    return scaled.square().sum(-1).clamp(max=most)


def _cosine(pair: Tensor) -> Tensor:
    """1 - cos of the two vectors `[2, ..., V]`.

    Each op computes both vectors at once: the time of a decoded token is the number of its ops.
    """
    below = math.nextafter(torch.finfo(pair.dtype).tiny, 0)
    with torch.no_grad():  # the peak cancels in the score, so its gradient is zero
        peak = torch.linalg.vector_norm(pair, math.inf, -1, keepdim=True)
        # what counts as zero becomes zero when it is divided by infinity, and so does its gradient
        peak = F.threshold(peak, below, math.inf)
    scaled = pair / peak
    # A vector that is not zero has an entry +-1 now and a norm of at least 1, so the clamp changes
    # only 0, which would give 0 / 0.
    norms = torch.linalg.vector_norm(scaled, dim=-1).prod(0).clamp(min=1)
    cosine = scaled.prod(0).sum(-1) / norms
    # rounding must not push a perfect prediction below 0, where the minimum and its gradient lie
    score: Tensor = (1 - cosine).clamp(min=0)
    return score


class _Scaled:
    """A vector as peak * scaled, with |scaled| = norm in [1, sqrt(V)].

    The peak is detached: it cancels in every score, so its gradient is zero.
    """

    def __init__(self, x: Tensor) -> None:
        peak = x.detach().abs().amax(-1)
        self.zero = peak < torch.finfo(x.dtype).tiny
        self.peak = peak.masked_fill(self.zero, 1)
        self.scaled = (x / self.peak[..., None]).masked_fill(self.zero[..., None], 0)
        self.norm = (self.scaled.square().sum(-1) + self.zero).sqrt()
