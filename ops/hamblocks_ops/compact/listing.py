"""Putting marked entries side by side: two ways to make lists of stored keys on plain torch.

`place` writes lists of a length known beforehand and waits for no device: `compact`. `marked` makes
lists that are as long as they have to be, so it waits: `gather` and `flash`. The Triton attention
makes its lists by kernels of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place(values: Tensor, slot: Tensor, capacity: int, fill: int) -> Tensor:
    """Writes values into lists, one list for each batch row and head.

    Args:
        values: integers that broadcast to `slot`.
        slot: int64 `[B, T, H]`, where in its list a token goes; `capacity` for a token that is
            left out. No two tokens of a list share a slot below `capacity`.
        capacity: length of the lists.
        fill: what stands in the slots that no token takes.

    Returns:
        int32 `[B, H, capacity]`.
    """
    batch, _, heads = slot.shape
    # one slot more takes the tokens that are left out, and is then cut off
    lists = torch.full((batch, capacity + 1, heads), fill, dtype=torch.int32, device=slot.device)
    lists.scatter_(1, slot, values.to(torch.int32).expand_as(slot))
    return lists[:, :capacity].transpose(1, 2)


def marked(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask is True, along its last dimension. Waits for the device.

    Returns:
        The places in the last dimension, int64, of all lists side by side without padding; and the
        length of each list, int64 of the shape of `mask` without its last dimension.
    """
    return mask.nonzero()[:, -1], mask.sum(-1)
