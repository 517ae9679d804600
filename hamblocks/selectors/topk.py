"""Stores the largest scores so far."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, TopKLedger, last_slots, new_positions, of_another
from hamblocks.protocols import Lifetimes, Selection, check_count
from hamblocks.selectors.combined import Composable
from hamblocks_ops import NEVER, decode, select_topk
from hamblocks_ops.arguments import wrong


@final
class TopK(Composable):
    """Stores the `k` largest scores of the tokens that came at least `delay` tokens ago.

    The smallest leaves when a larger one comes. Of equal scores the earlier token stays. With
    b(j) the first position at which k tokens have beaten token j (a larger score, or an equal one
    that came earlier; NEVER if that does not happen),

        evict_at[j] = min(b(j) + delay, NEVER)

    With `delay = w` every token lives in a window of w tokens first, and it competes when it leaves
    the window. This is the sparse cache of LoLA (arXiv 2505.23666) behind its sliding window. Up to
    w + k tokens are stored at a time. HOLA (arXiv 2607.02303) keeps its cache without a delay.
    """

    def __init__(self, k: int, delay: int = 0) -> None:
        """Makes the selector.

        Args:
            k: tokens stored per sequence and head, >= 0, apart from the window.
            delay: tokens that a token waits before it competes, >= 0.

        Raises:
            ValueError: `k` or `delay` is no integer >= 0.
        """
        super().__init__()
        k = check_count("k", k)
        delay = check_count("delay", delay)
        self.k = k
        self.delay = delay

    def extra_repr(self) -> str:
        """The arguments; `delay` only if there is one."""
        return super().extra_repr() if self.delay else f"k={self.k}"

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """The empty ledger: `k` empty slots per sequence and head."""
        return empty_ledger(self.k, batch_size, heads, device)

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
            evict_at = select_topk(score, self.k, position=position, cu_seqlens=cu_seqlens)
            return Selection(self._delayed(evict_at))
        new = new_positions(score, position, cu_seqlens)
        evict_at, lowered, after = compete(score, ledger, new, self.k)
        # A token leaves the ledger when it is beaten, not when its lifetime ends: nothing lowers
        # a lifetime after that. So the ledger needs no slot for the window.
        return Selection(
            self._delayed(evict_at), Lifetimes(lowered[0], self._delayed(lowered[1])), after
        )

    def _delayed(self, evict_at: Tensor) -> Tensor:
        """Lifetimes int32, `delay` tokens longer; padding, at -1, stays as it is."""
        if not self.delay:
            return evict_at
        # int32 would wrap around, so the sum is taken below NEVER
        delay = min(self.delay, NEVER)
        later = evict_at.clamp(max=NEVER - delay) + delay
        return torch.where(evict_at < 0, evict_at, later)


def empty_ledger(
    k: int, batch_size: int, heads: int, device: torch.device | None = None
) -> TopKLedger:
    """A ledger of `k` empty slots per sequence and head."""
    position = torch.full((batch_size, k, heads), EMPTY, dtype=torch.int32, device=device)
    return TopKLedger(position, torch.zeros(position.shape, device=device))


def compete(
    score: Tensor, ledger: TopKLedger, new: Tensor, k: int
) -> tuple[Tensor, Lifetimes, TopKLedger]:
    """The stored tokens compete with the new ones as if all of them came in one sequence.

    Args:
        score: `[N, T, H]`, of the new tokens.
        ledger: of k slots.
        new: int32 `[N, T, H]`, positions of the new tokens; -1 for those that do not compete.
        k: how many tokens are stored.

    Returns:
        The lifetimes of the new tokens, int32 `[N, T, H]`, those of the tokens in the ledger, and
        the ledger of the k best.

    Raises:
        ValueError: `ledger` is of another selector, or has another number of slots.
    """
    if not isinstance(ledger, TopKLedger):
        raise of_another(ledger, TopKLedger)
    slots = ledger.position.shape[1]
    if slots != k:
        raise wrong("ledger", f"one of k = {k} tokens", f"one of {slots}")
    fuses = score.device.type in decode.DEVICES and score.shape[1] == 1 and k > 0
    if fuses and decode.runs(score, ledger.score) and decode.runs(new, ledger.position):
        until, ends, *kept_slots = decode.compete(score, new, ledger.position, ledger.score)
        return until, Lifetimes(ledger.position, ends), TopKLedger(*kept_slots)
    where = torch.cat([ledger.position, new], 1)
    # A ledger starts in float32. Scores of a wider dtype widen it, which changes no comparison.
    dtype = torch.promote_types(score.dtype, ledger.score.dtype)
    scores = torch.cat([ledger.score.to(dtype), score.to(dtype)], 1)
    evict_at = select_topk(scores, k, position=where)
    kept = last_slots(evict_at == NEVER, k)
    lowered = Lifetimes(ledger.position, evict_at[:, :k])
    after = TopKLedger(kept.take(where, EMPTY), kept.take(scores, 0))
    return evict_at[:, k:], lowered, after
