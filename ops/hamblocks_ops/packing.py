"""Where a token stands: its sequence and its position within it, packed or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.arguments import values_are_checked

NEVER = 2**31 - 1
"""`evict_at` of a token that is stored for good."""


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Index of the sequence of every packed token, int64 `[tokens]`.

    An empty sequence has no token.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), index, right=True)


def int32(x: Tensor) -> Tensor:
    """Positions or lifetimes as int32.

    An int64 beyond the range of int32 becomes its end, so the largest int64 means NEVER. A cast
    alone would wrap it around, to -1.
    """
    if x.dtype == torch.int64:
        x = x.clamp(-NEVER - 1, NEVER)
    return x.to(torch.int32)


_UNPADDED = "hamblocks_unpadded"
"""Attribute of a tensor of positions none of which is padding."""


def unpadded(position: Tensor) -> Tensor:
    """Notes of positions that none is negative, which no op then has to find out; returns them."""
    if not torch.compiler.is_compiling():
        setattr(position, _UNPADDED, True)
    return position


def positions(
    batch: int, tokens: int, *, device: torch.device, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Position of every token within its sequence, int32 `[batch, tokens]`."""
    if cu_seqlens is None:
        counted = torch.arange(tokens, dtype=torch.int32, device=device)
        return unpadded(counted.expand(batch, tokens))
    index = torch.arange(tokens, device=device)
    index = index - cu_seqlens.long()[sequence_of(cu_seqlens, tokens)]
    return unpadded(index.to(torch.int32).expand(batch, tokens))


FEW_POSITIONS = 64
"""Up to this many positions, reading them one by one costs less than the op that masks padding."""


def no_padding(position: Tensor) -> bool:
    """Whether the host knows that no position is negative.

    False means that padding has to be masked. The host knows it of tensors that were given to
    `unpadded`. Values are read only where this is cheap and waits for no device: those of a
    decoding step on a CPU.

    Args:
        position: int, any shape; -1 marks padding.
    """
    # tracing comes first: a comparison of sizes would be a guard of the graph
    if not torch.compiler.is_compiling() and getattr(position, _UNPADDED, False):
        return True
    if not values_are_checked(position) or position.numel() > FEW_POSITIONS:
        return False
    return _least(position.tolist()) >= 0


def _least(values: Any) -> int:
    """The least of nested lists of numbers."""
    return min(map(_least, values)) if isinstance(values, list) else values
