"""One change of a cache: what stays where, what goes where, and how many pages that takes or frees."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks.cache.pool import Tokens
from hamblocks.cache.rows import Rows, lasting


@final
class Commit:
    """A change, found when it is made and applied later.

    Pages are chosen only when it is applied, for another cache of the pool may have taken some until then. It waits for
    the device unless pages were reserved; then no token moves and no page is freed, but holes are filled.
    """

    def __init__(self, rows: Rows, seen: Tensor, until: Tensor | None, new: Tokens | None) -> None:
        """Makes it.

        Args:
            rows: to be changed.
            seen: int32 `[N]`, tokens seen by then.
            until: int32 `[R, S]`, lowered lifetimes; None: as they are.
            new: R * T tokens, row after row; position NEVER is padding.

        Raises:
            ValueError: the pool may not grow so far; nothing was changed.
        """
        self.rows, self.pool, self.seen, self.until, self.new = rows, rows.pool, seen, until, new
        page_size, table = rows.pool.page_size, rows.table
        self.count = 0 if new is None or not len(table) else len(new.evict_at) // len(table)
        self.wait = rows.credit < max(self.count, 1) or not rows.private
        self.freed = self.wait and rows.pool.collect()
        stays = rows.alive(rows.lifetimes() if until is None else until, seen)
        if new is None:
            enters = stays[:, :0]
        else:
            arriving = new.evict_at.view(len(table), self.count)
            enters = rows.alive(arriving, seen) & (new.position.view_as(arriving) < arriving)
        self.have = (table >= 0).sum(1)
        self.keep = -(-(stays.sum(1) + enters.sum(1)) // page_size)
        if not self.wait:
            self.keep = self.keep.maximum(self.have)
        self.more = (self.keep - self.have).clamp(min=0)
        self.most, self.width = -(-self.count // page_size), rows.width
        if self.wait:
            self.most, self.width = (
                int(x.max()) if len(table) else 0 for x in (self.more, self.keep)
            )
        slots = max(self.width, rows.width) * page_size
        stays = pad(stays, [0, slots - stays.shape[1]])
        inside = torch.arange(slots, device=table.device) < self.keep[:, None] * page_size
        # the n-th token that comes takes the n-th hole, first those that move
        self.holes = (inside & ~stays).cumsum(1)
        outside = stays & ~inside
        self.moves = _Moves(outside, self.holes) if self.wait and bool(outside.any()) else None
        moving = 0 if self.moves is None else self.moves.count[:, None]
        self.place = torch.where(
            enters, torch.searchsorted(self.holes, moving + enters.cumsum(1)), -1
        )
        self.copies = None if rows.private else self._changed() & rows.common()
        self.need = 0
        if self.wait:
            self.need = int(self.more.sum()) + (
                0 if self.copies is None else int(self.copies.sum())
            )
            if self.need > rows.lease.promised:
                self.pool.ensure(self.need - rows.lease.promised)
            self.pool.promised += self.need
        rows.pending = True

    def _changed(self) -> Tensor:
        """Pages that the rows have, that change and stay, `[R, width]`."""
        rows, table = self.rows, self.rows.table
        columns = max(self.width, rows.width)
        changed = torch.zeros(len(table), columns + 1, dtype=torch.bool, device=table.device)
        if self.until is not None:
            differs = (rows.lifetimes() != self.until).view(*table.shape, self.pool.page_size)
            changed[:, : rows.width] = differs.any(2)
        for place in (self.place, self.place[:, :0] if self.moves is None else self.moves.place):
            changed.scatter_(1, torch.where(place < 0, columns, place // self.pool.page_size), True)
        keeps = torch.arange(rows.width, device=table.device) < self.keep[:, None]
        return changed[:, : rows.width] & keeps

    def drop(self) -> None:
        """Gives back what it was promised."""
        self.pool.promised -= self.need
        self.rows.pending = False

    @lasting
    def apply(self) -> None:
        """Makes the change."""
        rows, pool = self.rows, self.pool
        self.drop()
        if self.wait:
            rows.stop_reserving()
        if self.copies is not None:
            rows.unshare(self.copies)
        if self.until is not None:
            # pages that go back may still be another's
            rows.put_back(self.until, pool.evict_at, self.keep)
        rows.lease.widen(self.width)
        if self.most:
            self._take_pages()
        rows.width = max(self.width, rows.width)
        if self.moves is not None:
            moved = pool.read(rows.slots(self.moves.row, self.moves.source))
            if self.until is not None:
                moved = moved._replace(evict_at=self.until[self.moves.row, self.moves.source])
            pool.write(rows.slots(self.moves.row, self.moves.target), moved, wait=True)
        if self.new is not None:
            row = torch.arange(len(self.place), device=self.place.device)[:, None].expand_as(
                self.place
            )
            pool.write(rows.slots(row, self.place).flatten(), self.new, wait=self.wait)
        if self.wait:
            self._return_pages()
        else:
            rows.credit -= self.count
        rows.seen.copy_(self.seen)
        rows.turn += 1

    def _take_pages(self) -> None:
        """The next pages of every row, empty."""
        pool, table = self.pool, self.rows.lease.table
        step = torch.arange(self.most, device=table.device)
        wanted = step < self.more[:, None]
        turn = (self.more.cumsum(0) - self.more)[:, None] + step
        page = torch.where(wanted, pool.free(turn), -1).to(torch.int32)
        column = torch.where(wanted, self.have[:, None] + step, table.shape[1] - 1)
        table.scatter_(1, column, page)
        pool.list(page, 1)
        pool.evict_at.index_fill_(0, torch.where(page < 0, pool.waste, page).flatten().long(), 0)

    def _return_pages(self) -> None:
        pool, rows = self.pool, self.rows
        less = bool((self.keep < self.have).any())
        if less:
            gone = torch.arange(rows.width, device=self.keep.device) >= self.keep[:, None]
            pool.list(torch.where(gone, rows.table, -1), -1)
            rows.table.masked_fill_(gone, -1)
        if self.freed or less:
            pool.shrink()
        rows.width = self.width
        if not rows.private:
            rows.private = not bool(rows.common().any())


@final
class _Moves:
    """Tokens behind the pages that a row keeps, and the holes that they move into.

    Attributes:
        count: int64 `[R]`.
        place: int64 `[R, n]`, where they go, -1 for none.
        row, source, target: int64, one entry per token.
    """

    def __init__(self, moves: Tensor, holes: Tensor) -> None:
        self.count = moves.sum(1)
        most = int(self.count.max()) if len(self.count) else 0
        turn = torch.arange(1, most + 1, device=holes.device).expand(len(holes), -1)
        self.place = torch.searchsorted(holes, turn.contiguous())
        self.row, self.source = moves.nonzero().unbind(1)
        self.target = self.place[self.row, moves.cumsum(1)[self.row, self.source] - 1]
        self.place = torch.where(turn <= self.count[:, None], self.place, -1)
