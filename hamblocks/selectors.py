"""Selectors: from scores to lifetimes, for whole sequences or piece by piece.

`a | b` keeps what either selector keeps, `a & b` what both keep. Shapes: B batch rows, T new
tokens, N sequences, L ledger slots, H heads that decide.
"""

from __future__ import annotations

import numbers
from typing import cast, final

import torch
from torch import Tensor, nn

from hamblocks.controllers import FixedThreshold
from hamblocks.ledger import (
    EMPTY,
    CombinedLedger,
    Ledger,
    TopKLedger,
    find,
    last_slots,
    new_positions,
)
from hamblocks.ledger import lower as lower
from hamblocks.protocols import (
    Controller,
    HasCausality,
    HasLedger,
    IgnoresScore,
    Lifetimes,
    Selection,
    Selector,
    check_count,
    check_part,
)
from hamblocks.reachable import is_controller
from hamblocks_ops import NEVER, select_first, select_threshold, select_topk, select_window
from hamblocks_ops.arguments import wrong


def start(
    selector: Selector, batch_size: int, heads: int, device: torch.device | None = None
) -> Ledger | None:
    """The empty ledger of a selector.

    Args:
        selector: any selector.
        batch_size: N, the number of sequences.
        heads: H, the number of heads that decide.
        device: where the ledger is made; None: PyTorch's default device.

    Returns:
        None for a selector that never revises a lifetime.
    """
    if not isinstance(selector, HasLedger):
        return None
    ledger: Ledger | None = selector.start(batch_size, heads, device)
    return ledger


def is_causal(selector: Selector) -> bool:
    """Whether a selector decides from the past alone; one that does not has `causal = False`."""
    return not isinstance(selector, HasCausality) or bool(selector.causal)


def not_causal(selector: Selector) -> Selector | None:
    """The first selector, on either side of `|` and `&`, that is not causal; None if all are."""
    if isinstance(selector, Combined):
        found = not_causal(selector.left)
        return not_causal(selector.right) if found is None else found
    return None if is_causal(selector) else selector


def ignores_score(selector: Selector) -> bool:
    """Whether a selector decides by position alone; one that does has `ignores_score = True`."""
    return isinstance(selector, IgnoresScore) and bool(selector.ignores_score)


class Composable(nn.Module):
    """Gives a selector the operators `|` and `&`. The other side may be any selector."""

    def __or__(self, other: Selector) -> AnyOf:
        return AnyOf(self, other)

    def __ror__(self, other: Selector) -> AnyOf:
        return AnyOf(other, self)

    def __and__(self, other: Selector) -> AllOf:
        return AllOf(self, other)

    def __rand__(self, other: Selector) -> AllOf:
        return AllOf(other, self)

    def extra_repr(self) -> str:
        """The integers that the selector was made with."""
        return ", ".join(
            f"{name}={value}"
            for name, value in vars(self).items()
            if isinstance(value, int) and name[0] != "_" and name != "training"
        )


@final
class Threshold(Composable):
    """Stores a token for good if its score reaches tau (arXiv 2603.22325).

    `evict_at` is NEVER where `score >= tau` and `tau < inf`, elsewhere the token's own position.
    """

    controller: Controller

    def __init__(self, controller: Controller | float) -> None:
        """Makes the selector.

        Args:
            controller: sets tau: a `hamblocks.protocols.Controller`, or a number for a fixed tau.

        Raises:
            ValueError: `controller` is NaN, or neither a number nor a controller: nothing could
                step it.
        """
        super().__init__()
        if isinstance(controller, numbers.Real):
            controller = FixedThreshold(cast("float", controller))
        if not is_controller(controller):
            expected = "a number or a Controller (called with a score, and with a method step())"
            raise wrong("controller", expected, controller)
        self.controller = controller

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`. The controller gets NaN as the score of padding."""
        real = score
        if position is not None:
            real = score.masked_fill(position[..., None] == EMPTY, float("nan"))
        tau = self.controller(real)
        return Selection(select_threshold(score, tau, position=position, cu_seqlens=cu_seqlens))


@final
class Window(Composable):
    """Sliding window: a token is seen by itself and by the next `width - 1` queries."""

    ignores_score = True

    def __init__(self, width: int) -> None:
        """Makes the selector.

        Args:
            width: in tokens, >= 0; 0 stores nothing.

        Raises:
            ValueError: `width` is no integer >= 0.
        """
        super().__init__()
        check_count("width", width)
        self.width = width

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        return Selection(select_window(score, self.width, position=position, cu_seqlens=cu_seqlens))


@final
class FirstTokens(Composable):
    """Stores the first `n` tokens of each sequence for good (attention sinks, arXiv 2309.17453)."""

    ignores_score = True

    def __init__(self, n: int) -> None:
        """Makes the selector.

        Args:
            n: in tokens, >= 0.

        Raises:
            ValueError: `n` is no integer >= 0.
        """
        super().__init__()
        check_count("n", n)
        self.n = n

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        return Selection(select_first(score, self.n, position=position, cu_seqlens=cu_seqlens))


@final
class TopK(Composable):
    """Stores the `k` largest scores seen so far.

    The smallest leaves when a larger one comes. Of equal scores the earlier token stays.
    """

    def __init__(self, k: int) -> None:
        """Makes the selector.

        Args:
            k: tokens stored per sequence and head, >= 0.

        Raises:
            ValueError: `k` is no integer >= 0.
        """
        super().__init__()
        check_count("k", k)
        self.k = k

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """The empty ledger: `k` empty slots per sequence and head."""
        position = torch.full((batch_size, self.k, heads), EMPTY, dtype=torch.int32, device=device)
        return TopKLedger(position, torch.zeros(position.shape, device=device))

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
            return Selection(select_topk(score, self.k, position=position, cu_seqlens=cu_seqlens))
        new = new_positions(score, position, cu_seqlens)
        slots = ledger.position.shape[1]
        if slots != self.k:
            raise wrong("ledger", f"one of k = {self.k} tokens", f"one of {slots}")
        # The stored tokens compete with the new ones as if all of them came in one sequence.
        where = torch.cat([ledger.position, new], 1)
        # A ledger starts in float32. Scores of a wider dtype widen it, which changes no comparison.
        dtype = torch.promote_types(score.dtype, ledger.score.dtype)
        scores = torch.cat([ledger.score.to(dtype), score.to(dtype)], 1)
        evict_at = select_topk(scores, self.k, position=where)
        kept = last_slots(evict_at == NEVER, self.k)
        return Selection(
            evict_at=evict_at[:, self.k :],
            lowered=Lifetimes(ledger.position, evict_at[:, : self.k]),
            ledger=TopKLedger(kept.take(where, EMPTY), kept.take(scores, 0)),
        )


class Combined(Composable):
    """Two selectors over the same scores. A subclass says how two lifetimes of a token combine."""

    left: Selector
    right: Selector

    def __init__(self, left: Selector, right: Selector) -> None:
        """Makes the selector of its two sides.

        Raises:
            ValueError: a side is no selector.
        """
        super().__init__()
        for name, side in (("left", left), ("right", right)):
            check_part(name, side)
        self.left, self.right = left, right

    @property
    def causal(self) -> bool:
        """Whether both sides are causal."""
        return is_causal(self.left) and is_causal(self.right)

    @property
    def ignores_score(self) -> bool:
        """Whether neither side looks at scores."""
        return ignores_score(self.left) and ignores_score(self.right)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """Combines the lifetimes of the two sides, int32 of any one shape."""
        raise NotImplementedError

    def start(
        self, batch_size: int, heads: int, device: torch.device | None = None
    ) -> CombinedLedger | None:
        """The empty ledger, with the slots of both sides; None if neither side has a ledger."""
        left = start(self.left, batch_size, heads, device)
        right = start(self.right, batch_size, heads, device)
        listed = [ledger.position for ledger in (left, right) if ledger is not None]
        if not listed:
            return None
        position = torch.cat(listed, 1)  # all slots are empty: only their number counts
        return CombinedLedger(position, (position, position), (left, right))

    def forward(
        self,
        score: Tensor,
        ledger: CombinedLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        ledgers = (None, None) if ledger is None else ledger.ledgers
        left, right = (
            side(score, own, position=position, cu_seqlens=cu_seqlens)
            for side, own in zip((self.left, self.right), ledgers, strict=True)
        )
        evict_at = self.combine(left.evict_at, right.evict_at)
        if ledger is None:
            return Selection(evict_at)
        # Both lifetimes of a listed token are kept, not only the combined one: when one side lowers
        # its lifetime, the combination needs the other's.
        known = (
            lower(ledger.position, ledger.lifetimes[0], left.lowered),
            lower(ledger.position, ledger.lifetimes[1], right.lowered),
        )
        where = torch.cat([ledger.position, new_positions(score, position, cu_seqlens)], 1)
        listed = torch.zeros_like(where, dtype=torch.bool)
        for side in (left, right):
            if side.ledger is not None:
                listed |= find(side.ledger.position, where)[1]
        kept = last_slots(listed, ledger.position.shape[1])
        lifetimes = (
            kept.take(torch.cat([known[0], left.evict_at], 1), EMPTY),
            kept.take(torch.cat([known[1], right.evict_at], 1), EMPTY),
        )
        ledgers = (left.ledger, right.ledger)
        return Selection(
            evict_at=evict_at,
            lowered=Lifetimes(ledger.position, self.combine(*known)),
            ledger=CombinedLedger(kept.take(where, EMPTY), lifetimes, ledgers),
        )


@final
class AnyOf(Combined):
    """Keeps a token while either selector keeps it: `left | right`."""

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """The later of two lifetimes."""
        return torch.maximum(left, right)


@final
class AllOf(Combined):
    """Keeps a token while both selectors keep it: `left & right`."""

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """The earlier of two lifetimes."""
        return torch.minimum(left, right)
