"""Stores a number of tokens that grows more slowly than the sequence."""

from __future__ import annotations

import math
import numbers
from typing import final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, TopKLedger, last_slots, new_positions, of_another
from hamblocks.protocols import Lifetimes, Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks.selectors.nested import grown_topk
from hamblocks.selectors.topk import empty_ledger
from hamblocks_ops import NEVER, select_window
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import sequence_of

ROUNDING = 1 - 2.0**-40
"""Powers that are whole numbers, as 16**0.75, come out a little above them on some devices."""


@final
class SublinearGrowth(Composable):
    """Stores k(t) = ceil(scale * (t + 1)**a) tokens at time t, with `exponent` a in (0, 1).

    A new token joins those that are stored. If they are then more than k(t), the worst leaves: the
    one with the smallest score, and of equal scores the latest. So after token t,
    min(t + 1, k(t)) tokens are stored. With S(t) the tokens stored after token t,

        S(t) = the k(t) best of S(t - 1) and t
        evict_at[j] = the first t >= j with j not in S(t)

    A token that left never returns, so S(t) may differ from the k(t) best of all tokens. Of all
    sets with at most k(r) tokens up to every time r <= t, it is the one with the largest scores.
    From position `max_tokens - 1` on k is constant, since a ledger has a fixed number of slots.
    """

    def __init__(self, exponent: float, scale: float = 1.0, max_tokens: int = 65536) -> None:
        """Makes the selector.

        Args:
            exponent: a, in (0, 1).
            scale: factor of the power, > 0.
            max_tokens: the length up to which k grows, >= 1. The ledger has k(max_tokens - 1)
                slots per sequence and head.

        Raises:
            ValueError: a bad argument.
        """
        super().__init__()
        for name, value, top in (("exponent", exponent, 1.0), ("scale", scale, math.inf)):
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not 0 < value < top:
                raise wrong(name, f"a number in (0, {top:g})", value)
        max_tokens = check_count("max_tokens", max_tokens, 1)
        self.exponent = float(exponent)
        self.scale = float(scale)
        self.max_tokens = max_tokens

    @property
    def slots(self) -> int:
        """The most tokens that are stored per sequence and head."""
        most: int = math.ceil(self.scale * float(self.max_tokens) ** self.exponent * ROUNDING)
        return min(most, self.max_tokens)

    def places(self, position: Tensor) -> Tensor:
        """How many tokens may be stored after the token at each position.

        Args:
            position: int of any shape.

        Returns:
            int64 of the same shape, k(t).
        """
        # float64 and a function of the position alone: the same in one pass and in pieces
        length = (position.clamp(min=0, max=self.max_tokens - 1) + 1).double()
        grown = (self.scale * length**self.exponent * ROUNDING).ceil()
        return grown.clamp(max=self.slots).long()

    def extra_repr(self) -> str:
        """The arguments."""
        return f"exponent={self.exponent}, scale={self.scale}, max_tokens={self.max_tokens}"

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """The empty ledger: k(max_tokens - 1) empty slots per sequence and head."""
        return empty_ledger(self.slots, batch_size, heads, device)

    def forward(
        self,
        score: Tensor,
        ledger: TopKLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        if ledger is None:
            own = select_window(score, 0, position=position, cu_seqlens=cu_seqlens).long()
            sequence = None if cu_seqlens is None else sequence_of(cu_seqlens, score.shape[1])
            evict_at = grown_topk(score, self.places(own), own, sequence)
            return Selection(evict_at.to(torch.int32))
        if not isinstance(ledger, TopKLedger):
            raise of_another(ledger, TopKLedger)
        own = new_positions(score, position, cu_seqlens)
        slots = ledger.position.shape[1]
        if slots != self.slots:
            raise wrong("ledger", f"one of {self.slots} tokens", f"one of {slots}")
        where = torch.cat([ledger.position, own], 1)
        dtype = torch.promote_types(score.dtype, ledger.score.dtype)  # as in TopK
        scores = torch.cat([ledger.score.to(dtype), score.to(dtype)], 1)
        if score.shape[1] == 1:
            evict_at = self._after_one(scores, where)
        else:
            # The stored tokens had their places already: nothing leaves when they come.
            free = torch.full_like(ledger.position, NEVER).long()
            places = torch.cat([free, self.places(own)], 1)
            evict_at = grown_topk(scores, places, where.long()).to(torch.int32)
        kept = last_slots(evict_at == NEVER, slots)
        return Selection(
            evict_at=evict_at[:, slots:],
            lowered=Lifetimes(ledger.position, evict_at[:, :slots]),
            ledger=TopKLedger(kept.take(where, EMPTY), kept.take(scores, 0)),
        )

    def _after_one(self, score: Tensor, position: Tensor) -> Tensor:
        """Lifetimes of stored tokens and one new one, the last: what a decoding step needs.

        Args:
            score: `[N, L + 1, H]`.
            position: int32 `[N, L + 1, H]`; -1 for empty slots and padding.
        """
        real = position >= 0
        new = position[:, -1:]
        is_full = (real.sum(1, keepdim=True) > self.places(new)) & (new >= 0)
        score = score.masked_fill(score.isnan(), -math.inf)
        worst = score.masked_fill(~real, math.inf).amin(1, keepdim=True)
        column = torch.arange(score.shape[1], device=score.device)[:, None]
        last = torch.where(real & (score == worst), column, -1).amax(1, keepdim=True)
        lived = torch.where(is_full & (column == last), new, NEVER)
        return torch.where(real, lived, position)
