"""Surprise: one number for how far the memory's prediction missed the value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import check_floating, check_tensor, wrong
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    always,
    explain_table,
    interpreted,
    pick,
    without_triton,
)
from hamblocks_ops.precision import wide

MOST_COLUMNS = 16384
METRICS = ("cosine", "relative_l2", "l2")


class SurpriseCall(NamedTuple):
    """One checked call: what an implementation is given."""

    residual: Tensor
    v: Tensor
    metric: str


def surprise(residual: Tensor, v: Tensor, *, metric: str = "cosine", impl: str = "auto") -> Tensor:
    r"""Scores every token by its prediction error (Hybrid Associative Memories, arXiv 2603.22325).

    With the prediction \(p = v - r\): `cosine` is \(1 - \cos(p, v)\), `relative_l2` is \(|r| / |v|\), `l2` is
    \(|r|^2 / V\). Always finite: cosine is 1 with gradient 0 where the prediction or the value is zero, relative_l2 is
    1 with gradient 0 where the value is zero.

    Args:
        residual: `[B, T, H, V]`, floating: value minus prediction.
        v: `[B, T, H, V]`, same dtype.
        metric: "cosine", "relative_l2" or "l2".
        impl: "triton" (a GPU, one pass), "reference" (torch, any device), or "auto".

    Returns:
        `[B, T, H]`, float32 (float64 for float64 inputs), differentiable in both arguments.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
    """
    call = _checked(residual, v, metric)
    run = pick("surprise", TABLE, impl, call)
    with torch.autocast(device_type=v.device.type, enabled=False):
        score: Tensor = run(call)
    return score


def explain(residual: Tensor, v: Tensor, *, metric: str = "cosine") -> Explanation:
    """Every implementation of `surprise` with "yes", or the reason why it cannot run this call."""
    return explain_table(TABLE, _checked(residual, v, metric))


def _checked(residual: Tensor, v: Tensor, metric: str) -> SurpriseCall:
    check_tensor("v", v, "[B, T, H, V]", [None] * 4)
    check_floating("v", v)
    check_tensor("residual", residual, "[B, T, H, V]", v.shape, like=v)
    check_floating("residual", residual, like=v)
    if v.shape[-1] == 0:
        raise wrong("v", "a last dimension of at least 1", v)
    if metric not in METRICS:
        raise wrong("metric", "one of " + ", ".join(METRICS), metric)
    return SurpriseCall(residual, v, metric)


def _run_reference(call: SurpriseCall) -> Tensor:
    from hamblocks_ops.surprise.reference import reference

    dtype = wide(call.v)
    return reference(call.residual.to(dtype), call.v.to(dtype), call.metric)


def _refused_by_triton(call: SurpriseCall) -> str | None:
    if call.v.shape[-1] > MOST_COLUMNS:
        return f"a tile holds rows of up to {MOST_COLUMNS} entries, not {call.v.shape[-1]}"
    return without_triton(call.v)


def _run_triton(call: SurpriseCall) -> Tensor:
    from hamblocks_ops.surprise.triton import score

    result: Tensor = score(call.residual, call.v, call.metric)
    return result


TABLE = (
    Implementation("triton", _refused_by_triton, lambda: _run_triton, interpreted),
    Implementation("reference", always, lambda: _run_reference),
)
