"""Token lifetimes by their definitions: the oracle of the select ops.

`score` is [B, T, H], `position` int64 [B, T, H] ascending within a sequence, `sequence` int64 [T]
(packed) or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.packing import NEVER


def threshold(score: Tensor, tau: float, position: Tensor) -> Tensor:
    """NEVER iff score >= tau and tau < inf; NaN and padding (-1) are not stored."""
    reached = (score >= tau) & (position >= 0) & (tau < float("inf"))
    return torch.where(reached, NEVER, position)


def window(width: int, position: Tensor) -> Tensor:
    """Until `width` queries have seen it, the token itself among them."""
    return torch.where(position < 0, position, (position + width).clamp(max=NEVER))


def first(n: int, position: Tensor) -> Tensor:
    """For good iff it is among the first n."""
    return torch.where((position >= 0) & (position < n), NEVER, position)


def topk(score: Tensor, k: int, position: Tensor, sequence: Tensor | None) -> Tensor:
    """The first position at which k seen tokens of the same sequence beat token j."""
    score = score.masked_fill(score.isnan(), float("-inf"))
    tokens = score.shape[1]
    index = torch.arange(tokens, device=score.device)
    earlier = (index[:, None] < index)[None, :, :, None]  # [1, i, j, 1]: i came before j
    beats = (score[:, :, None] > score[:, None]) | ((score[:, :, None] == score[:, None]) & earlier)
    beats &= (position[:, :, None] >= 0) & (position[:, None] >= 0)
    together = torch.ones(tokens, tokens, dtype=torch.bool, device=score.device)
    if sequence is not None:
        together = sequence[:, None] == sequence
    beats &= together[None, :, :, None]
    beaten_by = beats.cumsum(1)  # [B, t, j, H]: tokens up to t that beat j
    seen = (index[:, None] >= index) & together
    lost = (beaten_by >= k) & seen[None, :, :, None] & (position[:, :, None] >= 0)
    when = torch.where(lost, position[:, :, None].expand_as(lost), NEVER)
    return torch.where(position < 0, position, when.amin(1)) if tokens else position


def visible(query_position: Tensor, key_position: Tensor, evict_at: Tensor) -> Tensor:
    """The dense mask of every policy: query t sees token j iff position_j <= t < evict_at_j."""
    return (key_position <= query_position) & (query_position < evict_at)
