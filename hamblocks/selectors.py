"""Selectors: scores to lifetimes, in one pass or piece by piece; `|` keeps what either side keeps, `&` what both do."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from hamblocks.controllers import FixedThreshold
from hamblocks.protocols import Controller, Lifetimes, Selection, Selector, check_count, check_part
from hamblocks_ops import NEVER, select_first, select_threshold, select_topk, select_window
from hamblocks_ops.arguments import wrong

EMPTY = -1
"""Position of an empty row of a ledger, and of padding."""


def start(
    selector: Selector, sequences: int, heads: int, device: torch.device | None = None
) -> Any:
    """The empty ledger of a selector; None for one that never revises a lifetime."""
    begin = getattr(selector, "start", None)
    return None if begin is None else begin(sequences, heads, device)


def is_causal(selector: Selector) -> bool:
    """Whether a selector decides from the past alone; it says `causal = False` if it does not."""
    return bool(getattr(selector, "causal", True))


def not_causal(selector: Selector) -> Selector | None:
    """The selector that is not causal, looked for on both sides of `|` and `&`; None if all are."""
    if isinstance(selector, _Combined):
        found = not_causal(selector.left)
        return not_causal(selector.right) if found is None else found
    return None if is_causal(selector) else selector


class Composable(nn.Module):
    """Gives a selector `|` and `&`. Any callable of the right kind may stand on the other side."""

    def __or__(self, other: Selector) -> AnyOf:
        return AnyOf(self, other)

    def __ror__(self, other: Selector) -> AnyOf:
        return AnyOf(other, self)

    def __and__(self, other: Selector) -> AllOf:
        return AllOf(self, other)

    def __rand__(self, other: Selector) -> AllOf:
        return AllOf(other, self)

    def extra_repr(self) -> str:
        """The numbers the selector was made with."""
        return ", ".join(
            f"{name}={value}"
            for name, value in vars(self).items()
            if isinstance(value, int) and name[0] != "_" and name != "training"
        )


@final
class Threshold(Composable):
    """Stores a token for good iff its score reaches tau (arXiv 2603.22325)."""

    def __init__(self, controller: Controller | float) -> None:
        """Controller: what sets tau, or a number for a fixed one."""
        super().__init__()
        self.controller = (
            FixedThreshold(controller) if isinstance(controller, (int, float)) else controller
        )
        check_part("controller", self.controller)

    def forward(
        self,
        score: Tensor,
        ledger: None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        real = (
            score
            if position is None
            else score.masked_fill(position[..., None] == EMPTY, float("nan"))
        )
        tau = self.controller(real)
        return Selection(select_threshold(score, tau, position=position, cu_seqlens=cu_seqlens))


@final
class Window(Composable):
    """Sliding window: a token is seen by itself and the next width - 1 queries."""

    def __init__(self, width: int) -> None:
        """Width in tokens, >= 0."""
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
    """Stores the first n tokens of every sequence for good (attention sinks, arXiv 2309.17453)."""

    def __init__(self, n: int) -> None:
        """N in tokens, >= 0."""
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


class TopKLedger(NamedTuple):
    """The tokens that a `TopK` stores now, in order of time.

    Attributes:
        position: int32 `[N, k, H]`, -1 for empty rows.
        score: `[N, k, H]`.
    """

    position: Tensor
    score: Tensor


@final
class TopK(Composable):
    """Stores the k largest scores seen so far; the worst leaves when a better one comes; ties to the earlier token."""

    def __init__(self, k: int) -> None:
        """K: tokens stored per sequence and head, >= 0."""
        super().__init__()
        check_count("k", k)
        self.k = k

    def start(self, sequences: int, heads: int, device: torch.device | None = None) -> TopKLedger:
        """An empty ledger."""
        position = torch.full((sequences, self.k, heads), EMPTY, dtype=torch.int32, device=device)
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
        rows = _rows(score, position, cu_seqlens)
        if ledger.position.shape[1] != self.k:
            raise wrong(
                "ledger", f"one of k = {self.k} tokens", f"one of {ledger.position.shape[1]}"
            )
        where = torch.cat([ledger.position, rows], 1)
        # ledgers start as float32; a wider score widens them, which changes no comparison
        wide = torch.promote_types(score.dtype, ledger.score.dtype)
        scores = torch.cat([ledger.score.to(wide), score.to(wide)], 1)
        evict_at = select_topk(scores, self.k, position=where)
        kept = _last(evict_at == NEVER, self.k)
        return Selection(
            evict_at=evict_at[:, self.k :],
            lowered=Lifetimes(ledger.position, evict_at[:, : self.k]),
            ledger=TopKLedger(kept(where, EMPTY), kept(scores, 0)),
        )


class CombinedLedger(NamedTuple):
    """The tokens that either side may still evict.

    Attributes:
        position: int32 `[N, L, H]`, -1 for empty rows.
        lifetimes: int32 `[N, L, H]` each: under the left and the right side.
        ledgers: of the left and the right side.
    """

    position: Tensor
    lifetimes: tuple[Tensor, Tensor]
    ledgers: tuple[Any, Any]


class _Combined(Composable):
    """Two selectors over the same scores; a subclass says how the two lifetimes of a token combine."""

    def __init__(self, left: Selector, right: Selector) -> None:
        super().__init__()
        for name, side in (("left", left), ("right", right)):
            check_part(name, side)
        self.left, self.right = left, right

    @property
    def causal(self) -> bool:
        return is_causal(self.left) and is_causal(self.right)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError

    def start(
        self, sequences: int, heads: int, device: torch.device | None = None
    ) -> CombinedLedger | None:
        """An empty ledger; None where neither side revises a lifetime."""
        ledgers = tuple(start(side, sequences, heads, device) for side in (self.left, self.right))
        listed = [ledger.position for ledger in ledgers if ledger is not None]
        if not listed:
            return None
        position = torch.cat(listed, 1)  # all empty: only the size counts
        return CombinedLedger(position, (position, position), (ledgers[0], ledgers[1]))

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
        sides = [
            side(score, own, position=position, cu_seqlens=cu_seqlens)
            for side, own in zip((self.left, self.right), ledgers, strict=True)
        ]
        evict_at = self.combine(sides[0].evict_at, sides[1].evict_at)
        if ledger is None:
            return Selection(evict_at)
        known = [
            lifetime if side.lowered is None else _update(ledger.position, lifetime, side.lowered)
            for side, lifetime in zip(sides, ledger.lifetimes, strict=True)
        ]
        where = torch.cat([ledger.position, _rows(score, position, cu_seqlens)], 1)
        listed = torch.zeros_like(where, dtype=torch.bool)
        for side in sides:
            if side.ledger is not None:
                listed |= _find(side.ledger.position, where)[1]
        kept = _last(listed, ledger.position.shape[1])
        left, right = (
            torch.cat([old, side.evict_at], 1) for old, side in zip(known, sides, strict=True)
        )
        return Selection(
            evict_at=evict_at,
            lowered=Lifetimes(ledger.position, self.combine(*known)),
            ledger=CombinedLedger(
                kept(where, EMPTY),
                (kept(left, EMPTY), kept(right, EMPTY)),
                (sides[0].ledger, sides[1].ledger),
            ),
        )


@final
class AnyOf(_Combined):
    """Kept while either selector keeps it: `left | right`."""

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """The later of two lifetimes."""
        return torch.maximum(left, right)


@final
class AllOf(_Combined):
    """Kept while both selectors keep it: `left & right`."""

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """The earlier of two lifetimes."""
        return torch.minimum(left, right)


def _rows(score: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of new tokens as rows of a ledger, int32 [N, T, H]."""
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens: expected None beside a ledger (pad pieces to [N, T, H] with position -1), got a packed batch"
        )
    if position is None:
        raise ValueError("position: expected int32 [B, T] beside a ledger, got None")
    return position.to(torch.int32)[..., None].expand(score.shape)


def _find(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions [N, M, H] stand in ascending rows [N, L, H]: index, and whether they do; empty rows never do."""
    if rows.shape[1] == 0:
        return torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(
            wanted, dtype=torch.bool
        )
    index = torch.searchsorted(rows.mT.contiguous(), wanted.mT.contiguous()).mT.clamp(
        max=rows.shape[1] - 1
    )
    return index, (rows.gather(1, index) == wanted) & (wanted != EMPTY)


def _update(position: Tensor, evict_at: Tensor, changes: Lifetimes) -> Tensor:
    """Lifetimes of the tokens at `position`, replaced where `changes` lists the token."""
    index, found = _find(changes.position, position)
    if changes.position.shape[1] == 0:
        return evict_at
    return torch.where(found, changes.evict_at.gather(1, index), evict_at)


class _last:  # noqa: N801 - reads as the function it is
    """Picks the listed tokens, at most `size` of them per row, in order, behind empty rows."""

    def __init__(self, listed: Tensor, size: int) -> None:
        order = listed.to(torch.int8).argsort(dim=1, stable=True)
        self.order = order[:, order.shape[1] - size :]
        self.listed = listed.gather(1, self.order)

    def __call__(self, values: Tensor, empty: int) -> Tensor:
        return torch.where(self.listed, values.gather(1, self.order), empty)


def lower(position: Tensor, evict_at: Tensor, changes: Lifetimes | None) -> Tensor:
    """Lifetimes of stored tokens after a selector lowered some.

    Args:
        position: int32 `[N, L, H]` or `[N, L, 1]`, of the stored tokens.
        evict_at: int32, same shape.
        changes: what the selector returned as `lowered`; None changes nothing.

    Returns:
        int32, same shape.
    """
    return evict_at if changes is None else _update(position, evict_at, changes)
