"""Attention over the stored keys in Triton, forward and backward, at the cost of what is stored.

1. `lists` puts the stored keys of every stream into one list, and finds for each block of queries
   which blocks of the list it visits.
2. `keys.copy_kernel` copies these keys side by side and writes the extremes of every block.
3. `forward.forward_kernel`: a block of queries visits blocks that it sees whole, without a mask,
   then a few that it sees in part.
4. `backward`: one kernel for the gradient of q, one for those of k, v and the bias.

Every program owns what it writes and adds it up in one order, so the same call gives the same bits.
If there will be a backward pass, out is kept in float32 beside the rounded one: the gradient of a
softmax is a difference that the rounding would spoil.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.declare import without_second_derivative
from hamblocks_ops.dispatch import launches
from hamblocks_ops.selected_attention import lists
from hamblocks_ops.selected_attention.call import AttentionCall, empty_grads, learns
from hamblocks_ops.selected_attention.triton.backward import keys_grad_kernel, queries_grad_kernel
from hamblocks_ops.selected_attention.triton.forward import forward_kernel
from hamblocks_ops.selected_attention.triton.keys import StoredKeys, dense, padded_dim
from hamblocks_ops.selected_attention.triton.sizes import Config, configs_of


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    """Sizes that are constants of the kernels."""
    return {
        "HEADS": q.shape[2],
        "KV_HEADS": k.shape[2],
        "DIM": q.shape[3],
        "WIDTH": padded_dim(q.shape[3]),
    }


def _tile(config: Config) -> dict[str, int]:
    """A launch as arguments of a kernel."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, config, strict=True))


@torch.library.custom_op("hamblocks::selected_attention_triton", mutates_args=())
@launches
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference`.

    Returns out in the dtype of q, lse, and out in float32 (empty unless `keep`).
    """
    out, lse, exact = _empty(q, keep)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf")), exact.zero_()
    config = configs_of(q, k, logit_bias)[0]
    time = lists.times(query_position, key_position, evict_at, cu_seqlens)
    keys = StoredKeys(k, v, logit_bias, time, config.keys)
    low, high = lists.query_blocks(time.asked, config.queries)
    plan = lists.plan_queries(keys.extremes, keys.first, low, high)
    q = dense(q)
    forward_kernel[(plan.shape[1], q.shape[0] * q.shape[2])](
        q, *keys.parts(), keys.extremes.least_position, keys.extremes.most_evict_at,
        time.asked.contiguous(), low, high, plan, out, exact, lse, *q.stride()[:3], scale,
        q.shape[1], keys.slots, **_shape(q, k), **_tile(config), HAS_BIAS=keys.has_bias, KEEP=keep,
    )  # fmt: skip
    return out, lse, exact


@attend.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, rest[-1])


def _empty(q: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    exact = q.new_empty(q.shape if keep else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), exact


@torch.library.custom_op("hamblocks::selected_attention_triton_backward", mutates_args=())
@launches
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    exact: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and logit_bias (empty without one) from the gradient of out."""
    dq, dk, dv, dbias = empty_grads(q, k, v, logit_bias)
    # a key that is not stored has no gradient, and no program writes it
    for x in (dk, dv, dbias):
        x.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk, dv, dbias
    _, of_queries, of_keys = configs_of(q, k, logit_bias)
    time = lists.times(query_position, key_position, evict_at, cu_seqlens)
    keys = StoredKeys(k, v, logit_bias, time, of_queries.keys)
    q, grad, asked = dense(q), grad.contiguous(), time.asked.contiguous()
    low, high = lists.query_blocks(asked, of_queries.queries)
    plan = lists.plan_queries(keys.extremes, keys.first, low, high)
    delta = torch.empty_like(lse)
    queries_grad_kernel[(plan.shape[1], q.shape[0] * q.shape[2])](
        q, *keys.parts(), keys.extremes.least_position, keys.extremes.most_evict_at, asked, low,
        high, plan, grad, exact, lse, delta, dq, *q.stride()[:3], scale, q.shape[1], keys.slots,
        **_shape(q, k), **_tile(of_queries), HAS_BIAS=keys.has_bias,
    )  # fmt: skip
    # the blocks of a list have the size of the tile, which may differ from kernel to kernel
    if of_keys.keys != of_queries.keys:
        keys = StoredKeys(k, v, logit_bias, time, of_keys.keys)
    plan = lists.plan_keys(keys.extremes, *lists.query_blocks(asked, of_keys.queries))
    keys_grad_kernel[(plan.shape[1], plan.shape[0])](
        q, *keys.parts(), keys.index, asked, plan, grad, lse, delta, dk, dv, dbias,
        *q.stride()[:3], scale, q.shape[1], k.shape[1], keys.slots,
        **_shape(q, k), **_tile(of_keys), HAS_BIAS=keys.has_bias,
    )  # fmt: skip
    return dq, dk, dv, dbias


@attend_backward.register_fake
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


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, scale, _keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(
    ctx: Any, grad: Tensor, _lse: Tensor, _exact: Tensor
) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, dbias if dbias.numel() else None, None, None, None, None, None


without_second_derivative("selected_attention, impl='triton',", attend_backward)
attend.register_autograd(_autograd_backward, setup_context=_setup_context)


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
    out, lse, _ = attend(*call, learns(call))
    return out, lse
