"""Spaces the tokens that another selector admits."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, find, last_slots, lower, new_positions, of_another
from hamblocks.protocols import Lifetimes, Selection, Selector, check_count
from hamblocks.selectors.questions import start
from hamblocks.selectors.times import time_keys
from hamblocks.selectors.wrapper import Wrapper
from hamblocks_ops import NEVER, select_window
from hamblocks_ops.lengths import is_symbolic


class CooldownLedger(NamedTuple):
    """The tokens that a `Cooldown` admitted and that `inner` may still evict.

    Attributes:
        position: int32 `[N, L, H]`, -1 for empty slots; as many as the ledger of `inner` has.
        evict_at: int32 `[N, L, H]`, their lifetimes.
        last: int32 `[N, 1, H]`, position of the last admitted token; -1 before the first.
        inner: the ledger of `inner`; None if it has none.
    """

    position: Tensor
    evict_at: Tensor
    last: Tensor
    inner: Any


@final
class Cooldown(Wrapper):
    """After a token is admitted, the next `n - 1` tokens are refused, per sequence and head.

    Let e(j) be the lifetime of token j under `inner`, which admits it if e(j) > j. With a(j) the
    position of the last token before j that this selector admitted (-inf before the first),

        evict_at[j] = e(j) if e(j) > j and j - a(j) >= n, else j

    A refused token starts no cooldown. From each admitted token the next one is the first that
    `inner` admits at a distance of n or more; pointer jumping finds this chain in O(log T) steps.
    """

    def __init__(self, inner: Selector, n: int) -> None:
        """Makes the selector.

        Args:
            inner: any selector.
            n: least distance of two admitted tokens, >= 1; 1 refuses none.

        Raises:
            ValueError: `inner` is no selector, or `n` is no integer >= 1.
        """
        super().__init__(inner)
        n = check_count("n", n, 1)
        self.n = n

    def start(
        self, batch_size: int, heads: int, device: torch.device | None = None
    ) -> CooldownLedger:
        """The empty ledger, with the slots of `inner`."""
        inner = start(self.inner, batch_size, heads, device)
        none = torch.full((batch_size, 1, heads), EMPTY, dtype=torch.int32, device=device)
        position = none[:, :0] if inner is None else inner.position
        return CooldownLedger(position, position, none, inner)

    def forward(
        self,
        score: Tensor,
        ledger: CooldownLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        if ledger is not None:
            if not isinstance(ledger, CooldownLedger):
                raise of_another(ledger, CooldownLedger)
            new_positions(score, position, cu_seqlens)  # checks the call
        own = select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
        inner = self.inner(
            score,
            None if ledger is None else ledger.inner,
            position=position,
            cu_seqlens=cu_seqlens,
        )
        wanted = inner.evict_at > own
        admitted = self._spaced(own, wanted, cu_seqlens, None if ledger is None else ledger.last)
        evict_at = torch.where(admitted, inner.evict_at, own)
        if ledger is None:
            return Selection(evict_at)
        known = lower(ledger.position, ledger.evict_at, inner.lowered)
        where = torch.cat([ledger.position, torch.where(admitted, own, EMPTY)], 1)
        listed = torch.zeros_like(where, dtype=torch.bool)
        if inner.ledger is not None:
            listed = find(inner.ledger.position, where)[1]
        kept = last_slots(listed, ledger.position.shape[1])
        last = torch.cat([ledger.last, torch.where(admitted, own, EMPTY)], 1)
        after = CooldownLedger(
            kept.take(where, EMPTY),
            kept.take(torch.cat([known, evict_at], 1), EMPTY),
            last.amax(1, keepdim=True),
            inner.ledger,
        )
        return Selection(evict_at, Lifetimes(ledger.position, known), after)

    def _spaced(
        self, own: Tensor, wanted: Tensor, cu_seqlens: Tensor | None, last: Tensor | None
    ) -> Tensor:
        """Which of the wanted tokens are admitted, bool `[B, T, H]`.

        Args:
            own: int32 `[B, T, H]`, positions; -1 for padding.
            wanted: bool `[B, T, H]`, False for padding.
            cu_seqlens: borders of packed sequences.
            last: int32 `[B, 1, H]`, the last admitted token before these; None: there is none.
        """
        tokens = own.shape[1]
        apart = min(self.n, NEVER)
        # The keys of packed sequences are farther apart than any cooldown. So one chain runs
        # through all of them, and each sequence starts with its first wanted token.
        key = time_keys(own, cu_seqlens)
        # the first wanted token at column t or later; `tokens` if there is none
        column = torch.arange(tokens, device=own.device).expand(key.shape)
        first = torch.where(wanted.mT, column, tokens).flip(2).cummin(2).values.flip(2)
        # no `pad`: its fill value would make a traced length a constant
        none = first.new_full((*first.shape[:2], 1), tokens)
        first = torch.cat([first, none], 2)
        # the wanted token that follows each token if it is admitted
        jump = first.gather(2, torch.searchsorted(key, key + apart))
        jump = torch.cat([jump, none], 2)
        if last is None:
            begin = torch.zeros_like(first[..., :1])
        else:
            free = torch.where(last < 0, 0, last.long() + apart).mT
            begin = torch.searchsorted(key, free.contiguous())
        admitted = torch.zeros_like(jump, dtype=torch.bool)
        admitted = admitted.scatter(2, first.gather(2, begin), True)
        follow = _chain_op if is_symbolic(tokens) else _chain
        return follow(admitted, jump)[..., :tokens].mT


def _chain(admitted: Tensor, jump: Tensor) -> Tensor:
    """Marks every token that is reached from a marked one.

    Args:
        admitted: bool `[B, H, T + 1]`, the first token of each chain.
        jump: int64 `[B, H, T + 1]`, the token after each one; T for none.

    Returns:
        bool `[B, H, T + 1]`.
    """
    tokens = jump.shape[2] - 1
    # After i rounds the first 2**i tokens of the chain are marked, and `jump` goes 2**i ahead.
    for _ in range(tokens.bit_length()):
        reached = torch.where(admitted, jump, tokens)
        admitted = admitted.scatter(2, reached, True)
        jump = jump.gather(2, jump)
    return admitted


@torch.library.custom_op("hamblocks::cooldown_chain", mutates_args=())
def _chain_op(admitted: Tensor, jump: Tensor) -> Tensor:
    """`_chain` as one operator, where a loop over the bits of T cannot be unrolled."""
    return _chain(admitted, jump)


@_chain_op.register_fake
def _(admitted: Tensor, _jump: Tensor) -> Tensor:
    return admitted.new_empty(admitted.shape)
