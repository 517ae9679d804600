"""Attention at the cost of the stored keys, on plain torch: gather them, then SDPA over blocks.

`plan` decides which parts of the keys a block of queries reads, `operands` gathers them, `forward`
reads the parts and merges them by their log-sum-exp, `backward` adds up the share of every part in
the gradients. Sums are float32 or float64 for every dtype of the inputs.

How much work there is depends on the values of evict_at, so the host reads them. torch.compile sees
one opaque operator with output shapes that depend on input shapes alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.declare import without_second_derivative
from hamblocks_ops.selected_attention.call import AttentionCall, empty_grads
from hamblocks_ops.selected_attention.gather.backward import backward
from hamblocks_ops.selected_attention.gather.forward import empty, forward
from hamblocks_ops.selected_attention.gather.plan import Batch


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call, unrounded."""
    result: tuple[Tensor, Tensor] = gather(*call)
    return result


def _sequences(cu_seqlens: Tensor | None) -> list[slice]:
    """The tokens of every sequence of a packed batch; all tokens of a batch that is not packed."""
    if cu_seqlens is None:
        return [slice(None)]
    borders = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


@torch.library.custom_op("hamblocks::selected_attention_gather", mutates_args=())
def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `reference`; returns out, unrounded, and lse."""
    with torch.autocast(device_type=q.device.type, enabled=False):
        call = Batch(q, k, v, evict_at, logit_bias, query_position, key_position)
        if cu_seqlens is None:
            return forward(call, scale)
        out, lse = empty(q)
        for own in _sequences(cu_seqlens):
            out[:, own], lse[:, own] = forward(call.of(own), scale)
        return out, lse


@gather.register_fake
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return empty(q)


@torch.library.custom_op("hamblocks::selected_attention_gather_backward", mutates_args=())
def gather_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and logit_bias (empty without one) from the gradient of out."""
    with torch.autocast(device_type=q.device.type, enabled=False):
        call = Batch(q, k, v, evict_at, logit_bias, query_position, key_position)
        if cu_seqlens is None:
            return backward(grad, call, out, lse, scale)
        grads = empty_grads(q, k, v, logit_bias)
        for own in _sequences(cu_seqlens):
            for whole, part in zip(
                grads,
                backward(grad[:, own], call.of(own), out[:, own], lse[:, own], scale),
                strict=True,
            ):
                if whole.numel():
                    whole[:, own] = part
        return grads


@gather_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_grads(q, k, v, logit_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = gather_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, dbias if dbias.numel() else None, None, None, None, None


without_second_derivative("selected_attention, impl='gather',", gather_backward)
gather.register_autograd(_autograd_backward, setup_context=_setup_context)
