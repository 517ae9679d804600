"""Lists by a running count and a scatter, on plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.packing import NEVER


def lists(evict_at: Tensor, position: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, H]` twice -> index, position and evict_at of what is stored, int32 `[B, H, capacity]`."""
    batch, tokens, heads = evict_at.shape
    stored = evict_at > position
    slot = torch.where(stored, stored.cumsum(1) - 1, capacity).clamp(max=capacity)

    def place(values: Tensor, fill: int) -> Tensor:
        found = torch.full(
            (batch, capacity + 1, heads), fill, dtype=torch.int32, device=evict_at.device
        )
        found.scatter_(1, slot, values.to(torch.int32).expand_as(slot))
        return found[:, :capacity].transpose(1, 2)

    index = torch.arange(tokens, device=evict_at.device)[None, :, None]
    return place(index, tokens), place(position, NEVER), place(evict_at, 0)
