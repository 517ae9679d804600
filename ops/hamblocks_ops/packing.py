"""Where a token stands: its sequence and its position within it, packed or not."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 2**31 - 1
"""`evict_at` of a token that is stored for good."""


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Index of the sequence of every packed token, int64 `[tokens]`.

    An empty sequence has no token.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), index, right=True)


def positions(
    batch: int, tokens: int, *, device: torch.device, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Position of every token within its sequence, int32 `[batch, tokens]`."""
    if cu_seqlens is None:
        return torch.arange(tokens, dtype=torch.int32, device=device).expand(batch, tokens)
    index = torch.arange(tokens, device=device)
    index = index - cu_seqlens.long()[sequence_of(cu_seqlens, tokens)]
    return index.to(torch.int32).expand(batch, tokens)
