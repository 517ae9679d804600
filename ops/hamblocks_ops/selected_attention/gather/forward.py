"""The forward pass of `gather`."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.gather.operands import Operands, widened
from hamblocks_ops.selected_attention.gather.plan import HIDDEN, Batch
from hamblocks_ops.selected_attention.merge import merge_into
from hamblocks_ops.selected_attention.sdpa import attend

DIRECT_MAX_QUERIES = 8
"""Most queries for which all keys are read where they lie: gathering would cost more."""


def empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse, uninitialised.

    Out is float32 or float64, because the backward pass reads it again.
    """
    return q.new_empty(q.shape, dtype=wide(q)), q.new_empty(q.shape[:3], dtype=wide(q))


def forward(call: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """Out `[B, Tq, H, D]`, unrounded, and lse `[B, Tq, H]`."""
    if call.q.shape[1] <= DIRECT_MAX_QUERIES and call.q.numel() and call.k.numel():
        return direct(call, scale)
    operands = Operands(call, scale)
    out, lse = empty(call.q)
    for block, parts in operands.blocks():
        asked = operands.by_stream(operands.q[:, block])
        have = torch.zeros_like(asked, memory_format=torch.contiguous_format)
        # a finite stand-in for -inf, below every hidden logit
        have_lse = torch.full_like(have[..., 0], 2 * HIDDEN)
        for part in parts:
            own = part.own
            more, more_lse = attend(asked[own], *operands.gather(part), part.mask, operands.scale)
            if part.first:
                have[own], have_lse[own] = more, more_lse
                continue
            have_lse[own] = merge_into(have[own], have_lse[own], more, more_lse)
        # a query that saw nothing has only hidden logits
        blind = have_lse < HIDDEN / 2
        if bool(blind.any()):
            have.masked_fill_(blind[..., None], 0)
            have_lse.masked_fill_(blind, float("-inf"))
        out[:, block], lse[:, block] = (
            operands.by_token(have)[..., : operands.dim],
            operands.by_token(have_lse),
        )
    return out, lse


def direct(call: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """The same for few queries: one call with a mask over all keys, where they lie.

    The queries of a group go one behind the other, so that SDPA reads each key once for all of
    them.
    """
    q, k, v, scale = widened(call, scale)
    kv_heads, dim = call.k.shape[2:]
    time, begins, ends = (
        call.query_position[:, None, :, None],
        call.key_position.mT,
        call.evict_at.mT,
    )
    visible = (begins[:, :, None] <= time) & (time < ends[:, :, None])
    asked = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    mask = torch.where(visible, q.new_zeros(()), float("-inf")).repeat(1, 1, asked.shape[2], 1)
    blind = ~visible.any(-1)[:, :, None]

    def read(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        have, have_lse = attend(
            asked.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), mask, scale
        )
        have = have.view(asked.shape).masked_fill(blind[..., None], 0)
        return have, have_lse.view(asked.shape[:-1]).masked_fill(blind, float("-inf"))

    have, have_lse = read(k, v)
    # a key that is not stored may hold anything, and 0 * inf is NaN. Looking is cheaper than
    # zeroing it every time.
    if not bool(have.isfinite().all()):
        unseen = ~visible.any(2).mT[..., None]
        have, have_lse = read(*(x.masked_fill(unseen, 0) for x in (k, v)))
    out, lse = empty(call.q)
    out.copy_(have[..., :dim].permute(0, 3, 1, 2, 4).reshape(out.shape))
    lse.copy_(have_lse.permute(0, 3, 1, 2).reshape(lse.shape))
    return out, lse
