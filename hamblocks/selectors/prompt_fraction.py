"""Keeps a fraction of the prompt, decided at its end."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction
from typing import final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, TopKLedger, new_positions
from hamblocks.protocols import Lifetimes, Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks.selectors.topk import compete, empty_ledger
from hamblocks_ops import NEVER, select_topk, select_window
from hamblocks_ops.arguments import wrong


@final
class PromptFraction(Composable):
    """Keeps the largest scores of the prompt, decided at its end.

    SnapKV (arXiv 2404.14469) compresses a prompt at this time, by another score.

    The first `length` tokens are the prompt. All of them are stored until position `length`. From
    there on only its m = ceil(fraction * length) largest scores are; of equal scores the earlier
    token stays. Let W be these m tokens:

        evict_at[j] = NEVER if j >= length or j in W, else length

    Later tokens are stored for good. `PromptFraction(...) & (FirstTokens(length) | Window(64))`
    stores them for 64 queries. A sequence of at most `length` tokens keeps all of them. A token
    with m better ones in the prompt can no longer be in W, so its lifetime is set to `length` at
    once, and the ledger has m slots.
    """

    def __init__(self, fraction: float, length: int) -> None:
        """Makes the selector.

        Args:
            fraction: the share of the prompt that is kept, in [0, 1]. It is taken as the decimal
                number that it prints as, so that 0.1 of 30 tokens are exactly 3.
            length: the number of tokens in the prompt, >= 0.

        Raises:
            ValueError: `fraction` is no number in [0, 1], or `length` is no integer >= 0.
        """
        super().__init__()
        is_number = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
        if not is_number or not 0 <= fraction <= 1:
            raise wrong("fraction", "a number in [0, 1]", fraction)
        length = check_count("length", length)
        self.fraction = float(fraction)
        self.length = length
        # 0.1 * 30 is 3.0000000000000004 in floating point, so the product is taken exactly
        self.count = math.ceil(Fraction(repr(self.fraction)) * length)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"fraction={self.fraction}, length={self.length}"

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """The empty ledger: a slot per sequence and head for every token that is kept."""
        return empty_ledger(self.count, batch_size, heads, device)

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
            own = select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
            prompt = self._prompt(own)
            beaten = select_topk(score, self.count, position=prompt, cu_seqlens=cu_seqlens)
            return Selection(self._lived(own, beaten))
        own = new_positions(score, position, cu_seqlens)
        beaten, lowered, after = compete(score, ledger, self._prompt(own), self.count)
        listed = Lifetimes(lowered.position, self._lived(lowered.position, lowered.evict_at))
        return Selection(self._lived(own, beaten), listed, after)

    def _prompt(self, position: Tensor) -> Tensor:
        """Positions of the tokens that compete, -1 for the others."""
        return position.masked_fill(position >= self.length, EMPTY)

    def _lived(self, position: Tensor, beaten: Tensor) -> Tensor:
        """Lifetimes, int32, from the positions at which m tokens have beaten each token."""
        lost = (position < self.length) & (beaten < NEVER)
        lived = torch.where(lost, self.length, NEVER).to(torch.int32)
        return torch.where(position < 0, position, lived)
