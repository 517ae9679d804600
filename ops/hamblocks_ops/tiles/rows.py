"""Tiles of vectors: how far predictions missed values, and the gradient of that.

The definition is `hamblocks_ops.surprise.reference`.

A tile is [R vectors, C columns], with zeros beyond the last column, in float32 or float64. Every
vector is scaled by its largest entry before it is squared, so that no square over- or underflows.
"""

from typing import Any

import torch
import triton
import triton.language as tl

TILE_ENTRIES = 4096
"""Entries of a tile: R * C."""


def launch(dim: int, metric: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a kernel over vectors of `dim` entries, computed in `dtype`."""
    width, finfo = int(triton.next_power_of_2(dim)), torch.finfo(dtype)
    block = max(1, TILE_ENTRIES // width)
    return {
        "METRIC": metric,
        "DIM": dim,
        "WIDTH": width,
        "BLOCK": block,
        "TINY": finfo.tiny,
        "MOST": finfo.max,
    }


@triton.jit
def scaled(x, TINY: tl.constexpr):
    """Vectors as peak [R] * norm [R] * unit [R, C], |unit| = 1; and which count as zero."""
    peak = tl.max(tl.abs(x), 1)
    zero = peak < TINY
    peak = tl.where(zero, 1.0, peak)
    x = tl.where(zero[:, None], 0.0, x / peak[:, None])
    norm = tl.sqrt(tl.sum(x * x, 1) + tl.where(zero, 1.0, 0.0))
    return x / norm[:, None], norm, peak, zero


@triton.jit
def surprise_of(
    residual,
    v,
    prediction,
    METRIC: tl.constexpr,
    DIM: tl.constexpr,
    TINY: tl.constexpr,
    MOST: tl.constexpr,
):
    """Scores [R] of vectors [R, C]; prediction is v - residual."""
    # if, elif, else: Triton would compile what stands behind a branch that returns
    if METRIC == "cosine":
        p, _, _, no_p = scaled(prediction, TINY)
        value, _, _, no_value = scaled(v, TINY)
        cosine = tl.where(no_p | no_value, 0.0, tl.sum(p * value, 1))
        return tl.maximum(1 - cosine, 0.0)
    elif METRIC == "relative_l2":
        _, norm, peak, none = scaled(residual, TINY)
        _, v_norm, v_peak, no_value = scaled(v, TINY)
        lead = peak / v_peak
        over = lead == float("inf")
        ratio = tl.where(none, 0.0, tl.where(over, 0.0, lead) * (norm / v_norm))
        return tl.where(no_value, 1.0, tl.where(over, MOST, tl.minimum(ratio, MOST)))
    else:
        part = residual * (DIM**-0.5)
        return tl.minimum(tl.sum(part * part, 1), MOST)


@triton.jit
def surprise_grad(
    residual,
    v,
    wanted,
    METRIC: tl.constexpr,
    DIM: tl.constexpr,
    TINY: tl.constexpr,
    MOST: tl.constexpr,
):
    """Gradients of residual and v, both [R, C], from that of the score, wanted [R]."""
    if METRIC == "cosine":
        p, p_norm, p_peak, no_p = scaled(v - residual, TINY)
        value, v_norm, v_peak, no_value = scaled(v, TINY)
        cosine = tl.sum(p * value, 1)
        share = tl.where(no_p | no_value | (cosine > 1), 0.0, wanted)[:, None]
        of_p = share * (cosine[:, None] * p - value) / p_norm[:, None] / p_peak[:, None]
        of_v = share * (cosine[:, None] * value - p) / v_norm[:, None] / v_peak[:, None]
        return -of_p, of_p + of_v
    elif METRIC == "relative_l2":
        error, norm, peak, none = scaled(residual, TINY)
        value, v_norm, v_peak, no_value = scaled(v, TINY)
        lead = peak / v_peak
        over = lead == float("inf")
        ratio = tl.where(over, 0.0, lead) * (norm / v_norm)
        share = tl.where(none | no_value | over | (ratio > MOST), 0.0, wanted)[:, None]
        of_residual = share * error / v_norm[:, None] / v_peak[:, None]
        return of_residual, -share * ratio[:, None] * (value / v_norm[:, None] / v_peak[:, None])
    else:
        part = residual * (DIM**-0.5)
        share = tl.where(tl.sum(part * part, 1) > MOST, 0.0, wanted)[:, None]
        return share * 2 * part * (DIM**-0.5), tl.zeros_like(v)
