"""Attention over pages by its definition: all pages of a stream, a dense mask and one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.paged_attention.layout import PagedCall, unpage
from hamblocks_ops.selected_attention.reference import reference as attend


def run(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns out `[N, T, Hq, D]` and lse `[N, T, Hq]`, unrounded."""
    padded = unpage(call.slabs, call.block_table)
    together = call.slabs[0].k.shape[2]
    position, evict_at, logit_bias = (
        None if x is None else x.repeat_interleave(together, 2) for x in padded[2:]
    )
    assert position is not None
    assert evict_at is not None
    if logit_bias is not None:
        hidden = logit_bias == float("-inf")
        evict_at = torch.where(hidden, position, evict_at)
        logit_bias = logit_bias.masked_fill(hidden, 0)
    return attend(
        call.q,
        padded.k,
        padded.v,
        evict_at,
        scale=call.scale,
        logit_bias=logit_bias,
        query_position=call.query_position,
        key_position=position,
        cu_seqlens=None,
    )
