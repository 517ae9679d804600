"""`a | b` keeps what either selector keeps, `a & b` what both keep."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from hamblocks.heads import DecidesByHead
from hamblocks.ledger import (
    EMPTY,
    CombinedLedger,
    find,
    last_slots,
    lower,
    new_positions,
    of_another,
)
from hamblocks.protocols import Lifetimes, Selection, Selector, check_part
from hamblocks.selectors.questions import ignores_score, is_causal, start


class Composable(nn.Module):
    """Gives a selector the operators `|` and `&`. The other side may be any selector."""

    @property
    def by_head(self) -> bool:
        """See `hamblocks.heads.DecidesByHead`."""
        return all(decides_by_head(inner) for inner in self._inners())

    def _inners(self) -> tuple[Selector, ...]:
        """The selectors inside this one."""
        return ()

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


def decides_by_head(selector: object) -> bool:
    """Whether a selector declares that it decides for each head alone (`by_head`)."""
    return isinstance(selector, DecidesByHead) and selector.by_head


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

    def _inners(self) -> tuple[Selector, ...]:
        return self.left, self.right

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
        if ledger is not None and not isinstance(ledger, CombinedLedger):
            raise of_another(ledger, CombinedLedger)
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
