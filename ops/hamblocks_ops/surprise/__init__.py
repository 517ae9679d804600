"""Surprise: one number per token and head for how far the memory's prediction missed the value."""

from __future__ import annotations

from torch import Tensor

from hamblocks_ops.arguments import check_floating, check_tensor, wrong
from hamblocks_ops.declare import Hints, op_with_choice
from hamblocks_ops.dispatch import Implementation, interpreted, without_triton
from hamblocks_ops.surprise import reference
from hamblocks_ops.surprise.call import METRICS, SurpriseCall

__all__ = ["METRICS", "surprise"]

MAX_COLUMNS = 16384
"""Largest V of the Triton kernels: a tile holds whole vectors."""


def _refused_by_triton(call: SurpriseCall) -> str | None:
    if call.v.shape[-1] > MAX_COLUMNS:
        return f"a tile holds vectors of up to {MAX_COLUMNS} entries, not {call.v.shape[-1]}"
    return without_triton(call.v)


def _run_triton(call: SurpriseCall) -> Tensor:
    from hamblocks_ops.surprise.triton import run

    return run(call)


@op_with_choice(
    Implementation("triton", _run_triton, _refused_by_triton, passed_over=interpreted, opaque=True),
    Implementation("reference", reference.run),
    finish=lambda _call, score: score,
    hints=Hints(
        differentiable=True, packs="it takes no packed sequences", by_token=("residual", "v")
    ),
    example=lambda x: ((x, x), {}),
)
def surprise(residual: Tensor, v: Tensor, *, metric: str = "cosine", impl: str = "auto") -> Tensor:
    r"""Scores every token by its prediction error (Hybrid Associative Memories, arXiv 2603.22325).

    With the prediction \(p = v - r\): `cosine` is \(1 - \cos(p, v)\), `relative_l2` is \(|r| /
    |v|\), `l2` is \(|r|^2 / V\). Always finite: cosine is 1 with gradient 0 where the prediction or
    the value is zero, relative_l2 is 1 with gradient 0 where the value is zero.

    Args:
        residual: `[B, T, H, V]`, floating: value minus prediction.
        v: `[B, T, H, V]`, same dtype.
        metric: "cosine", "relative_l2" or "l2".
        impl: "triton" (a GPU, one pass), "reference" (torch, any device), or "auto".

    Returns:
        `[B, T, H]`, float32 (float64 for float64 inputs), differentiable in both arguments.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    return surprise.request(SurpriseCall(residual, v, metric), impl)


@surprise.check
def _check_surprise(
    residual: Tensor, v: Tensor, *, metric: str = "cosine", impl: str = "auto"
) -> None:
    check_tensor("v", v, "[B, T, H, V]", [None] * 4)
    check_floating("v", v)
    check_tensor("residual", residual, "[B, T, H, V]", v.shape, like=v)
    check_floating("residual", residual, like=v)
    if v.shape[-1] == 0:
        raise wrong("v", "a last dimension of at least 1", v)
    if metric not in METRICS:
        raise wrong("metric", "one of " + ", ".join(METRICS), metric)
