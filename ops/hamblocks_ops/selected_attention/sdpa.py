"""Softmax attention over one part of the keys, with the log-sum-exp that merging takes."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [R, G, i, D], k and v [R, G, n, D] -> out [R, G, i, D] and lse [R, G, i]."""
    if q.device.type == "cpu":
        q, k, v = (_dense(x) for x in (q, k, v))
        result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
        return result
    logits = _logits(q, k, mask, scale)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients; `out` and `lse` are those of all parts together."""
    if q.device.type == "cpu":
        grad, q, k, v, out = (_dense(x) for x in (grad, q, k, v, out))
        grads: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
            )
        )
        return grads
    weight = (_logits(q, k, mask, scale) - lse[..., None]).exp()
    change = scale * weight * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return change @ k, change.mT @ q, weight.mT @ grad


def _dense(x: Tensor) -> Tensor:
    """With a contiguous last dimension, which torch's kernel takes for granted without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = scale * (q @ k.mT)
    return logits if mask is None else logits + mask
