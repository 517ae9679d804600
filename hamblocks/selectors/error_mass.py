"""Stores the tokens that carry a share of all scores."""

from __future__ import annotations

import numbers
from typing import NamedTuple, final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, last_slots, new_positions, of_another
from hamblocks.protocols import Lifetimes, Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks_ops import NEVER, select_window
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import sequence_of


class ErrorMassLedger(NamedTuple):
    """The tokens that an `ErrorMass` stores now, in order of position.

    Attributes:
        position: int32 `[N, capacity, H]`, -1 for empty slots.
        score: float64 `[N, capacity, H]`, -1 for empty slots.
        sum: float64 `[N, 1, H]`, the sum of the stored scores.
        total: float64 `[N, 1, H]`, the sum of all scores so far.
    """

    position: Tensor
    score: Tensor
    sum: Tensor
    total: Tensor


@final
class ErrorMass(Composable):
    """Stores the fewest tokens whose scores reach a share of the sum of all scores so far.

    With x the scores, m(t) = x_0 + ... + x_t, and S(t) the tokens stored after token t, the
    tokens of S(t - 1) and t are ranked by score, of equal scores the earlier token first:

        S(t) = their shortest prefix with a sum >= share * m(t), at most `capacity` tokens
        evict_at[j] = the first t >= j with j not in S(t)

    A token that left never returns, but its score still counts in m(t). Unless `capacity` has
    evicted a token, the stored scores always reach share * m(t): a new token adds x_t to their
    sum, and share * x_t to what it must reach. With equal scores about share * T tokens are
    stored. This number has no bound, hence `capacity`.

    Scores are errors: those below 0 and NaN count as 0, and a score of 0 is never stored. Infinite
    scores count as the largest float32. Sums are float64 and taken in order of time. The tokens are
    decided one after the other, which the other selectors need not do: O(T log capacity) on a CPU,
    O(T * capacity) elsewhere.
    """

    def __init__(self, share: float, capacity: int) -> None:
        """Makes the selector.

        Args:
            share: of the sum of all scores, in [0, 1].
            capacity: the most tokens that are stored per sequence and head, >= 1.

        Raises:
            ValueError: `share` is no number in [0, 1], or `capacity` is no integer >= 1.
        """
        super().__init__()
        is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
        if not is_number or not 0 <= share <= 1:
            raise wrong("share", "a number in [0, 1]", share)
        capacity = check_count("capacity", capacity, 1)
        self.share = float(share)
        self.capacity = capacity

    def extra_repr(self) -> str:
        """The arguments."""
        return f"share={self.share}, capacity={self.capacity}"

    def start(
        self, batch_size: int, heads: int, device: torch.device | None = None
    ) -> ErrorMassLedger:
        """The empty ledger: `capacity` empty slots per sequence and head."""
        size = (batch_size, self.capacity, heads)
        position = torch.full(size, EMPTY, dtype=torch.int32, device=device)
        none = torch.zeros(size, dtype=torch.float64, device=device)
        return ErrorMassLedger(position, none - 1, none[:, :1], none[:, :1])

    def forward(
        self,
        score: Tensor,
        ledger: ErrorMassLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        if ledger is None:
            own = select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
        else:
            if not isinstance(ledger, ErrorMassLedger):
                raise of_another(ledger, ErrorMassLedger)
            own = new_positions(score, position, cu_seqlens)
            slots = ledger.position.shape[1]
            if slots != self.capacity:
                raise wrong("ledger", f"one of {self.capacity} tokens", f"one of {slots}")
        most = torch.finfo(torch.float32).max
        new = score.detach().double().nan_to_num(0.0, most, 0.0).clamp(0, most)
        new = new.masked_fill(own < 0, -1.0)
        if ledger is None:
            return Selection(self._lived(new, own, None, cu_seqlens)[0])
        where = torch.cat([ledger.position, own], 1)
        evict_at, held, total = self._lived(new, where, ledger, None)
        kept = last_slots((where >= 0) & (evict_at == NEVER), self.capacity)
        return Selection(
            evict_at=evict_at[:, self.capacity :],
            lowered=Lifetimes(ledger.position, evict_at[:, : self.capacity]),
            ledger=ErrorMassLedger(
                kept.take(where, EMPTY),
                kept.take(torch.cat([ledger.score, new], 1), -1),
                held,
                total,
            ),
        )

    def _lived(
        self, new: Tensor, where: Tensor, ledger: ErrorMassLedger | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lifetimes of the tokens in the ledger and of new ones.

        Args:
            new: float64 `[N, T, H]`, scores of the new tokens; -1 for padding.
            where: int32 `[N, L + T, H]`, positions of the stored and the new tokens.
            ledger: the L tokens that are stored; None: none, L is 0.
            cu_seqlens: borders of packed sequences.

        Returns:
            Lifetimes, int32 `[N, L + T, H]`; the sum of the stored scores and that of all scores,
            float64 `[N, 1, H]`.
        """
        from hamblocks.selectors.mass import error_mass

        batch, tokens, heads = new.shape

        def streams(x: Tensor) -> Tensor:
            return x.mT.reshape(batch * heads, -1).contiguous()

        def tensor(x: Tensor) -> Tensor:
            return x.view(batch, heads, -1).mT

        stored = new.new_zeros(batch, 0, heads)
        held = total = new.new_zeros(batch, 1, heads)
        if ledger is not None:
            stored, held, total = ledger.score, ledger.sum, ledger.total
        first = None
        if cu_seqlens is not None:
            sequence = sequence_of(cu_seqlens, tokens)
            first = torch.nn.functional.pad(sequence.diff() > 0, [1, 0], value=True)[:tokens]
        leaves, held, total = error_mass(
            *(streams(new), first, streams(stored), streams(held), streams(total)),
            *(self.share, self.capacity),
        )
        if tokens == 0:
            return torch.where(where < 0, where, NEVER), tensor(held), tensor(total)
        leaves = tensor(leaves)
        at = leaves.clamp(max=tokens - 1) + (where.shape[1] - tokens)
        lived = torch.where(leaves < tokens, where.gather(1, at), NEVER)
        return torch.where(where < 0, where, lived), tensor(held), tensor(total)
