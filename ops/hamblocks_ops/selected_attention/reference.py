"""Softmax attention over stored tokens with a dense mask: what others are compared with.

Query t of a sequence sees token j iff position_j <= t < evict_at_j. Its weights are softmax(scale
q_t . k_j + logit_bias_j) over the tokens that it sees. A query that sees nothing reads 0 and has
lse = -inf. In low precision the operands of both products are rounded to the dtype of the inputs,
as on a tensor core; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.packing import sequence_of
from hamblocks_ops.precision import wide
from hamblocks_ops.select.reference import visible
from hamblocks_ops.selected_attention.call import AttentionCall


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call, unrounded."""
    return reference(
        call.q,
        call.k,
        call.v,
        call.evict_at,
        scale=call.scale,
        logit_bias=call.logit_bias,
        query_position=call.query_position,
        key_position=call.key_position,
        cu_seqlens=call.cu_seqlens,
    )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    *,
    scale: float,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q `[B, Tq, H, D]`, k and v `[B, Tk, Hkv, D]`, the rest `[B, Tk, Hkv]`.

    Returns out and lse, unrounded.
    """
    dtype = wide(q)
    queries, heads = q.shape[1:3]
    kv_heads = k.shape[2]
    mask = visible(
        query_position[:, :, None, None], key_position[:, None], evict_at[:, None]
    )  # [B, i, j, Hkv]
    if cu_seqlens is not None:
        own, other = sequence_of(cu_seqlens, queries), sequence_of(cu_seqlens, k.shape[1])
        mask = mask & (own[:, None] == other)[None, :, :, None]
    # a key that no query sees may hold anything, and 0 * NaN is NaN
    unseen = ~mask.any(1)[..., None]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    grouped = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
    logits = scale * torch.einsum("bihgd,bjhd->bhgij", grouped, k.to(dtype))
    if logit_bias is not None:
        logits = logits + logit_bias.to(dtype).transpose(1, 2)[:, :, None, None]
    logits = logits.masked_fill(~mask.permute(0, 3, 1, 2)[:, :, None], float("-inf"))
    # subtracting a finite maximum keeps queries that see nothing at exp(-inf) = 0, forward and
    # backward; one more column, because there may be no key at all
    peak = pad(logits.detach(), [0, 1], value=float("-inf")).amax(-1, keepdim=True)
    weight = (logits - peak.masked_fill(peak == float("-inf"), 0)).exp()
    total = weight.sum(-1, keepdim=True)
    share = weight / total.masked_fill(total == 0, 1)
    out = torch.einsum("bhgij,bjhd->bihgd", share.to(q.dtype).to(dtype), v.to(dtype)).flatten(2, 3)
    lse = (total.log() + peak).squeeze(-1).permute(0, 3, 1, 2).flatten(2, 3)
    return out, lse.detach()
