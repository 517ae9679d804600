"""Order statistics of scores: thresholds between two of them, and their spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max / 4
"""Bound of what is saved, so that the difference of two saved numbers is finite in float32."""


def threshold_between(scores: Tensor, fraction: Tensor) -> Tensor:
    """The threshold between two scores that a share nearest to `fraction` of the scores reaches.

    Let s_1 <= ... <= s_n be the scores without NaN. The threshold

        tau_i = (s_i + s_{i+1}) / 2,    i = 1, ..., n - 1,

    rounded to float32, admits n - i of them. Among those i with s_i < tau_i < s_{i+1}, the result
    is the tau_i with the smallest |n - i - fraction * n|; if two are equally near, the smaller
    tau_i, which admits more. So tau equals no score, and the share it admits never falls as
    `fraction` rises. Special cases:

    - Equal scores are all admitted or all refused: no threshold stands between them. Neither does
      one between two adjacent float32 numbers.
    - An infinite score counts as max + range or min - range of the finite scores, where range is
      max - min (or the larger of 1 and |max| if that is 0), so that the midpoint is finite.
    - If no threshold stands between any two scores (one score, all scores equal), the result is
      -inf for fraction >= 1/2 and +inf below: nearest to the fraction. Without scores it is -inf.
    - fraction = 0 gives +inf, fraction = 1 gives -inf.

    Args:
        scores: floating `[n]`, n >= 2; NaN stands for no score.
        fraction: floating `[]`, in [0, 1].

    Returns:
        tau, float32 `[]`, on the device of `scores`. Nothing waits for the device.
    """
    return between(ordered(scores), fraction)


def between(scores: Tensor, fraction: Tensor) -> Tensor:
    """`threshold_between` of scores as `ordered` returns them."""
    count = scores.isfinite().sum()
    below, above = scores[:-1], scores[1:]
    tau = ((below + above) / 2).float()
    stands = (below < tau) & (tau < above)
    admits = count - torch.arange(1, len(scores), device=scores.device)
    # exact in float64, so that ties are ties; argmin returns the first of them
    miss = (admits - fraction.double() * count).abs().where(stands, math.inf)
    nothing_stands = torch.where((fraction >= 0.5) | (count == 0), -math.inf, math.inf)
    result = torch.where(stands.any(), _at(tau, miss.argmin()), nothing_stands.float())
    return result.where(fraction > 0, math.inf).where(fraction < 1, -math.inf)


def spread(scores: Tensor) -> Tensor:
    """Interquartile range over that of a standard normal, float32 `[]`.

    Where it is 0, because most scores are equal, the standard deviation. Returns 0 without scores.

    Args:
        scores: as `ordered` returns them.
    """
    count = scores.isfinite().sum()
    low, high = (_quantile(scores, count, share) for share in (0.25, 0.75))
    deviation = (scores - scores.nanmean()).square().nanmean().sqrt()
    result = torch.where(high > low, (high - low) / 1.349, deviation)
    return result.nan_to_num(0.0).clamp(max=LARGEST).float()


def _quantile(scores: Tensor, count: Tensor, share: float) -> Tensor:
    """Quantile of the first `count` ascending values, by linear interpolation."""
    place = (count - 1).clamp(min=0).double() * share
    below = place.floor().long()
    above = place.ceil().long()
    return _at(scores, below).lerp(_at(scores, above), place - below)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` for an index `[]`, which that expression would read on the host."""
    return values.gather(0, index.reshape(1)).squeeze(0)


def ordered(scores: Tensor) -> Tensor:
    """Sorted scores, float64: infinities made finite as in `threshold_between`, NaN last."""
    scores = scores.double()
    finite = scores.isfinite()
    # if no score is finite, both are 0
    highest = scores.where(finite, -math.inf).amax().nan_to_num(neginf=0.0)
    lowest = scores.where(finite, math.inf).amin().nan_to_num(posinf=0.0)
    span = highest - lowest
    span = torch.where(span > 0, span, highest.abs().clamp(min=1))
    # the bounds lie outside the finite scores, so only infinities change, and NaN stays NaN
    return scores.clamp(lowest - span, highest + span).sort().values
