"""FlexAttention over all keys as they come: the baseline for the other implementations."""

from __future__ import annotations

from torch import Tensor

from hamblocks_ops.selected_attention.block_mask import Keys, attend, seen_at_all
from hamblocks_ops.selected_attention.call import AttentionCall
from hamblocks_ops.selected_attention.lists import Times


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
    return attend(call, as_they_come)


def as_they_come(call: AttentionCall, time: Times) -> Keys:
    """All keys in their own order."""
    # a key that no query sees may hold anything, and 0 * NaN is NaN
    unseen = ~seen_at_all(time)[..., None]
    k, v = (x.masked_fill(unseen, 0).transpose(1, 2) for x in (call.k, call.v))
    bias = call.logit_bias
    return Keys(
        k,
        v,
        None if bias is None else bias.transpose(1, 2),
        time.position.transpose(1, 2),
        time.evict_at.transpose(1, 2),
    )
