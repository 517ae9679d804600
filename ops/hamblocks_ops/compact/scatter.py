"""`compact` by a running count and a scatter, on plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.compact.call import CompactCall, Compacted, lengths_of
from hamblocks_ops.compact.listing import place
from hamblocks_ops.packing import NEVER


def run(call: CompactCall) -> Compacted:
    """Lists what a call stores."""
    return Compacted(*lists(call.evict_at, call.position, call.capacity), lengths_of(call))


def lists(evict_at: Tensor, position: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, H]` twice -> index, position, evict_at of stored tokens, int32 `[B, H, capacity]`."""
    tokens = evict_at.shape[1]
    stored = evict_at > position
    # the number of stored tokens before a token is its slot; a list that is full takes no more
    slot = torch.where(stored, stored.cumsum(1) - 1, capacity).clamp(max=capacity)
    index = torch.arange(tokens, device=evict_at.device)[None, :, None]
    return (
        place(index, slot, capacity, tokens),
        place(position, slot, capacity, NEVER),
        place(evict_at, slot, capacity, 0),
    )
