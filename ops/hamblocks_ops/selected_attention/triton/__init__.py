"""Attention over the stored keys in Triton, forward and backward, at the cost of what is stored.

1. `moments`: on which clock queries ask and keys are stored.
2. `listing`: the tokens of every stream in one list, in classes.
3. `keys.copy_kernel` copies the stored keys side by side and writes the extremes of every block.
4. `plan`: which blocks of the list each block of queries visits, and the other way round.
5. `forward.forward_kernel`: a block of queries visits blocks that it sees whole, without a mask,
   then a few that it sees in part.
6. `backward`: one kernel for the gradient of q, one for those of k, v and the bias. They take lists
   and plans from the forward pass.

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
from hamblocks_ops.selected_attention.call import AttentionCall, empty_grads, learns
from hamblocks_ops.selected_attention.triton.backward import keys_grad_kernel, queries_grad_kernel
from hamblocks_ops.selected_attention.triton.forward import forward_kernel
from hamblocks_ops.selected_attention.triton.keys import dense, padded_dim
from hamblocks_ops.selected_attention.triton.sizes import Config, configs_of
from hamblocks_ops.selected_attention.triton.stored import Sizes, StoredKeys, blocks, store_keys
from hamblocks_ops.tiles.attention import LOG2E


def _shape(q: Tensor, kv_heads: int) -> dict[str, int]:
    """Sizes that are constants of the kernels."""
    return {
        "HEADS": q.shape[2],
        "KV_HEADS": kv_heads,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes as in `reference`.

    Returns out in the dtype of q, lse, out in float32, and the fields of `StoredKeys`; all but the
    first two are empty unless `keep`.
    """
    out, lse, exact, kept = _empty(q, k, logit_bias, keep)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf")), exact, *kept
    call = AttentionCall(
        q, k, v, evict_at, logit_bias, query_position, key_position, cu_seqlens, scale
    )
    configs = configs_of(q, k, logit_bias)
    stored = store_keys(call, configs, keep=keep)
    q, tile = dense(q), configs[0]
    plan = Sizes.of(q, k, configs, keep=keep).split(stored.plans)[0]
    forward_kernel[(_programs(q, tile),)](
        q, *stored.parts(), stored.asked, plan, out, exact, lse, *q.stride()[:3],
        _factor(scale), q.shape[1],
        stored.k.shape[1], **_shape(q, k.shape[2]), **_tile(tile),
        HAS_BIAS=logit_bias is not None, KEEP=keep,
    )  # fmt: skip
    return out, lse, exact, *(stored if keep else kept)


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, logit_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *results, kept = _empty(q, k, logit_bias, rest[-1])
    return *results, *kept


def _empty(
    q: Tensor, k: Tensor, logit_bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, StoredKeys]:
    """The results of `attend`, uninitialised."""
    kept = StoredKeys.none(q)
    if keep:
        sizes = Sizes.of(q, k, configs_of(q, k, logit_bias), keep=True)
        kept = StoredKeys.empty(q, k, logit_bias, sizes)
    exact = q.new_empty(q.shape if keep else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), exact, kept


@torch.library.custom_op("hamblocks::selected_attention_triton_backward", mutates_args=())
@launches
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    logit_bias: Tensor | None,
    lse: Tensor,
    exact: Tensor,
    k_list: Tensor,
    v_list: Tensor,
    bias_list: Tensor,
    times: Tensor,
    asked: Tensor,
    plans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and logit_bias (empty without one) from the gradient of out.

    k serves for its sizes alone, as v has the same.
    """
    dq, dk, dv, dbias = empty_grads(q, k, k, logit_bias)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    configs = configs_of(q, k, logit_bias)
    stored = StoredKeys(k_list, v_list, bias_list, times, asked, plans)
    sizes = Sizes.of(q, k, configs, keep=True)
    _, of_queries, of_keys = sizes.split(plans)
    q, grad, delta = dense(q), grad.contiguous(), torch.empty_like(lse)
    shape = {**_shape(q, k.shape[2]), "HAS_BIAS": logit_bias is not None}
    queries_grad_kernel[(_programs(q, configs[1]),)](
        q, *stored.parts(), asked, of_queries, grad, exact, lse, delta, dq, *q.stride()[:3], scale,
        _factor(scale),
        q.shape[1], sizes.slots, **shape, **_tile(configs[1]),
    )  # fmt: skip
    keys_grad_kernel[(sizes.streams * sizes.slots // configs[2].keys,)](
        q, *stored.parts(), times[0], asked, of_keys, grad, lse, delta, dk, dv, dbias,
        *q.stride()[:3], scale, _factor(scale), q.shape[1], k.shape[1], sizes.slots, **shape,
        **_tile(configs[2]),
    )  # fmt: skip
    return dq, dk, dv, dbias


@attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, logit_bias: Tensor | None, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_grads(q, k, k, logit_bias)


def _factor(scale: float) -> float:
    """The scale of logits in base 2: rounded once, and the same in all kernels."""
    return scale * float(LOG2E.value)


def _programs(q: Tensor, tile: Config) -> int:
    """Programs of a kernel that owns blocks of queries."""
    return q.shape[0] * q.shape[2] * blocks(q.shape[1], tile.queries)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, _, logit_bias, *_ = inputs
    ctx.save_for_backward(q, k, logit_bias, *output[1:])
    ctx.scale = inputs[-2]
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx: Any, grad: Tensor, *_rest: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, dbias if dbias.numel() else None, None, None, None, None, None


without_second_derivative("selected_attention, impl='triton',", attend_backward)
attend.register_autograd(_autograd_backward, setup_context=_setup_context)


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
    out, lse, *_ = attend(*call, learns(call))
    return out, lse
