"""Ledgers of selectors: lists of the tokens whose lifetimes may still be lowered.

A ledger has L slots for every sequence and head. A slot holds the position of one token. Positions
are in ascending order, and empty slots (position -1) come first. Shapes: N sequences, L slots, M
tokens to look up, H heads.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hamblocks.protocols import Lifetimes
from hamblocks_ops.arguments import wrong

EMPTY = -1
"""Position of an empty ledger slot, and of padding."""


class Ledger(Protocol):
    """The interface of all ledgers."""

    @property
    def position(self) -> Tensor:
        """int32 `[N, L, H]`, ascending: the tokens that the selector may still evict; -1: empty."""
        ...


class TopKLedger(NamedTuple):
    """The tokens that a `TopK` stores now, in order of position.

    Attributes:
        position: int32 `[N, k, H]`, -1 for empty slots.
        score: `[N, k, H]`, 0 for empty slots.
    """

    position: Tensor
    score: Tensor


class CombinedLedger(NamedTuple):
    """The tokens that either side of `|` or `&` may still evict.

    Attributes:
        position: int32 `[N, L, H]`, -1 for empty slots.
        lifetimes: int32 `[N, L, H]` each: the lifetimes under the left and the right side.
        ledgers: the ledgers of the left and the right side; None for a side without one.
    """

    position: Tensor
    lifetimes: tuple[Tensor, Tensor]
    ledgers: tuple[Ledger | None, Ledger | None]


class Slots(NamedTuple):
    """The candidates that a ledger lists in its slots.

    Attributes:
        candidate: int64 `[N, L, H]`, the candidate that each slot lists.
        filled: bool `[N, L, H]`, False for slots that stay empty.
    """

    candidate: Tensor
    filled: Tensor

    def take(self, values: Tensor, empty: int) -> Tensor:
        """Values `[N, M, H]` of the candidates -> values of the slots, `empty` for empty slots."""
        return torch.where(self.filled, values.gather(1, self.candidate), empty)


def last_slots(listed: Tensor, size: int) -> Slots:
    """Slots for the last `size` listed candidates, in order. Empty slots come before them.

    Args:
        listed: bool `[N, M, H]`, which candidates are to be listed.
        size: L, the number of slots; M is at least L.
    """
    # a stable sort puts the listed candidates last and keeps their order
    order = listed.to(torch.int8).argsort(dim=1, stable=True)
    candidate = order[:, order.shape[1] - size :]
    return Slots(candidate, listed.gather(1, candidate))


def of_another(ledger: object, kind: type) -> ValueError:
    """The error of a ledger that comes from a selector with another kind of ledger than `kind`."""
    return wrong("ledger", f"one of type {kind.__name__}", f"a {type(ledger).__name__}")


def new_positions(score: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of new tokens as a ledger lists them, int32 `[N, T, H]`.

    Args:
        score: `[N, T, H]`.
        position: int `[N, T]`.
        cu_seqlens: must be None.

    Raises:
        ValueError: no position is given, or the batch is packed.
    """
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens: expected None beside a ledger (pad pieces to [N, T, H] with position -1), "
            "got a packed batch"
        )
    if position is None:
        raise ValueError("position: expected int32 [B, T] beside a ledger, got None")
    return position.to(torch.int32)[..., None].expand(score.shape)


def find(position: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Looks tokens up in a ledger.

    Args:
        position: int32 `[N, L, H]`, ascending, of the ledger's slots.
        wanted: int32 `[N, M, H]`, positions to look up.

    Returns:
        The slot of each wanted token, int64 `[N, M, H]`, and whether it is there, bool `[N, M, H]`.
        An empty slot is never found.
    """
    if position.shape[1] == 0:
        index = torch.zeros_like(wanted, dtype=torch.int64)
        return index, torch.zeros_like(wanted, dtype=torch.bool)
    # searchsorted looks along the last dimension
    index = torch.searchsorted(position.mT.contiguous(), wanted.mT.contiguous()).mT
    index = index.clamp(max=position.shape[1] - 1)
    return index, (position.gather(1, index) == wanted) & (wanted != EMPTY)


def lower(position: Tensor, evict_at: Tensor, changes: Lifetimes | None) -> Tensor:
    """Lifetimes of tokens after a selector lowered some.

    Args:
        position: int32 `[N, M, H]` or `[N, M, 1]`, the tokens.
        evict_at: int32, same shape, their lifetimes.
        changes: what the selector returned as `lowered`; None changes nothing.

    Returns:
        int32, same shape: the lifetime in `changes` for tokens listed there, else `evict_at`.
    """
    if changes is None or changes.position.shape[1] == 0:
        return evict_at
    index, found = find(changes.position, position)
    return torch.where(found, changes.evict_at.gather(1, index), evict_at)
