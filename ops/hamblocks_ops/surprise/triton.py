"""Surprise in Triton: one kernel forward and one backward, each reads residual and value once.

A program owns a block of vectors: BLOCK rows of DIM entries of the flattened `[B * T * H, V]`,
padded to WIDTH columns. The arithmetic is that of `tiles.rows`, in float32 or float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.declare import without_second_derivative
from hamblocks_ops.dispatch import launches
from hamblocks_ops.surprise.call import SurpriseCall
from hamblocks_ops.tiles.rows import launch, surprise_grad, surprise_of


@triton.jit
def surprise_kernel(
    residual, v, score, rows, METRIC: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Scores of a block of vectors."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    place, inside = (
        row[:, None] * DIM + column[None, :],
        (row < rows)[:, None] & (column < DIM)[None, :],
    )
    # the score has the dtype of the arithmetic: float32, or float64 for float64 inputs
    wide = score.dtype.element_ty
    # columns beyond DIM are zeros, which change no norm and no product
    error = tl.load(residual + place, mask=inside, other=0.0).to(wide)
    value = tl.load(v + place, mask=inside, other=0.0).to(wide)
    tl.store(
        score + row,
        surprise_of(error, value, value - error, METRIC, DIM, TINY, MOST),
        mask=row < rows,
    )


@triton.jit
def surprise_grad_kernel(
    residual, v, wanted, d_residual, dv, rows, METRIC: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Gradients of residual and v for a block of vectors; nothing is kept from the forward pass."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    place, inside = (
        row[:, None] * DIM + column[None, :],
        (row < rows)[:, None] & (column < DIM)[None, :],
    )
    wide = wanted.dtype.element_ty
    error = tl.load(residual + place, mask=inside, other=0.0).to(wide)
    value = tl.load(v + place, mask=inside, other=0.0).to(wide)
    grad = tl.load(wanted + row, mask=row < rows, other=0.0)
    of_residual, of_v = surprise_grad(error, value, grad, METRIC, DIM, TINY, MOST)
    tl.store(d_residual + place, of_residual.to(d_residual.dtype.element_ty), mask=inside)
    tl.store(dv + place, of_v.to(dv.dtype.element_ty), mask=inside)


@torch.library.custom_op("hamblocks::surprise_triton", mutates_args=())
@launches
def score(residual: Tensor, v: Tensor, metric: str) -> Tensor:
    """`[..., V]` twice -> `[...]`, float32 (float64)."""
    result = _empty(v)
    if result.numel():
        constants = launch(v.shape[-1], metric, result.dtype)
        grid = (triton.cdiv(result.numel(), constants["BLOCK"]),)
        surprise_kernel[grid](
            residual.contiguous(), v.contiguous(), result, result.numel(), **constants
        )
    return result


@score.register_fake
def _(residual: Tensor, v: Tensor, metric: str) -> Tensor:
    return _empty(v)


def _empty(v: Tensor) -> Tensor:
    return v.new_empty(v.shape[:-1], dtype=torch.promote_types(v.dtype, torch.float32))


@torch.library.custom_op("hamblocks::surprise_triton_backward", mutates_args=())
@launches
def score_backward(grad: Tensor, residual: Tensor, v: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients of residual and v."""
    grads = residual.new_empty(residual.shape), v.new_empty(v.shape)
    if grad.numel():
        constants = launch(v.shape[-1], metric, grad.dtype)
        grid = (triton.cdiv(grad.numel(), constants["BLOCK"]),)
        given = residual.contiguous(), v.contiguous(), grad.contiguous()
        surprise_grad_kernel[grid](*given, *grads, grad.numel(), **constants)
    return grads


@score_backward.register_fake
def _(grad: Tensor, residual: Tensor, v: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.metric = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *score_backward(grad, *ctx.saved_tensors, ctx.metric), None


without_second_derivative("surprise, impl='triton',", score_backward)
score.register_autograd(_autograd_backward, setup_context=_setup_context)


def run(call: SurpriseCall) -> Tensor:
    """Scores a call."""
    result: Tensor = score(call.residual, call.v, call.metric)
    return result
