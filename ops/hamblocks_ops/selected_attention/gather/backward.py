"""The backward pass of `gather`.

SDPA's backward pass, given the out and lse of all parts together, yields the share of one part in
the gradients. The plan is made again rather than kept: it depends on integers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.selected_attention.gather.operands import Operands
from hamblocks_ops.selected_attention.gather.plan import HIDDEN, Batch, Tokens
from hamblocks_ops.selected_attention.sdpa import attend_backward


def backward(
    grad: Tensor, call: Batch, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty without one) from that of out `[B, Tq, H, D]`."""
    q, k, _, _, logit_bias, *_ = call
    operands = Operands(call, scale)
    # with a bias, q and k have one more column than out
    bias_column = [0, operands.width - operands.dim]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    flat, lasting = ([torch.zeros_like(x) for x in xs] for xs in (operands.flat, operands.lasting))
    for block, parts in operands.blocks():
        asked = operands.by_stream(operands.q[:, block])
        wanted, read = (
            pad(operands.by_stream(x[:, block].to(operands.q.dtype)), bias_column)
            for x in (grad, out)
        )
        # a query that sees nothing has lse = -inf. With HIDDEN / 2 in its place its weights are
        # exp(HIDDEN / 2) = 0.
        read_lse = operands.by_stream(lse[:, block]).clamp(min=HIDDEN / 2)
        change = torch.zeros_like(asked, memory_format=torch.contiguous_format)
        for part in parts:
            own = part.own
            more_q, *more = attend_backward(
                wanted[own],
                asked[own],
                *operands.gather(part),
                read[own],
                read_lse[own],
                part.mask,
                operands.scale,
            )
            change[own] += more_q
            for whole, kept, share in zip(flat, lasting, more, strict=True):
                # the heads of a group read the same keys
                share = share.sum(1, keepdim=True)
                if isinstance(part.keys, Tokens):
                    _add_keys(whole, part.keys, share)
                else:
                    kept[part.streams, :, part.keys] += share
        dq[:, block] = operands.rescale * operands.by_token(change)[..., : operands.dim]
    for whole, kept in zip(flat, lasting, strict=True):
        _add_keys(whole, operands.lasting_tokens, kept)
    dk, dv = (x.view(*k.shape[:3], operands.width) for x in flat)
    dbias = (
        q.new_empty(0)
        if logit_bias is None
        else dk[..., operands.dim].to(logit_bias.dtype, copy=True)
    )
    dk, dv = (x[..., : operands.dim].to(k.dtype, copy=True) for x in (dk, dv))
    return dq, dk, dv, dbias


def _add_keys(whole: Tensor, tokens: Tokens, share: Tensor) -> None:
    """Adds `[R, 1, n, width]` to the keys `tokens`.

    The share of padding is zero, wherever it is added.
    """
    whole.index_add_(0, tokens.flat.flatten(), share.flatten(0, 2))
