"""One change of a cache: what stays where, what goes where, and the pages that takes or frees."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks.cache.pool import Reservation, Tokens
from hamblocks.cache.streams import Streams, Unallocated, lasting


@final
class Commit:
    """A change, planned when it is made and applied later.

    Pages are chosen only when it is applied: another cache of the pool may have taken some until
    then. Planning waits for the device unless pages were reserved; then no token moves and no page
    is freed, but holes are filled.

    Attributes (of the plan; R streams, S slots):
        count: new tokens per stream, padding included.
        wait: whether the device is waited for.
        have, keep, more: int64 `[R]`, pages of a stream now, afterwards, and to be taken.
        most: the largest of `more`.
        width: columns of the page table afterwards.
        moves: tokens that move into holes, so that pages at the end become free; or None.
        place: int64 `[R, count]`, where in its stream a new token goes, -1 for nowhere.
        copies: bool `[R, width]`, pages to copy first because another cache lists them; or None.
    """

    def __init__(
        self,
        streams: Streams,
        seen: Tensor,
        until: Tensor | None,
        new: Tokens | None,
        origin: Unallocated | None = None,
    ) -> None:
        """Plans the change.

        Args:
            streams: to be changed.
            seen: int32 `[N]`, tokens seen by then.
            until: int32 `[R, S]`, lowered lifetimes; None: as they are.
            new: R * T tokens, stream after stream; position NEVER is padding.
            origin: what the streams were made from, if this is their first change.

        Raises:
            ValueError: the pool may not grow so far; nothing was changed.
        """
        self.streams, self.pool, self.origin = streams, streams.pool, origin
        self.seen, self.until, self.new = seen, until, new
        self.count = 0
        if new is not None and len(streams.table):
            self.count = len(new.evict_at) // len(streams.table)
        self.wait = streams.reservation.steps < max(self.count, 1) or not streams.private
        self.freed = self.wait and self.pool.collect()
        stays, enters = self._who_stays(), self._who_enters()
        self._count_pages(stays, enters)
        self._find_places(stays, enters)
        self.copies = None if streams.private else self._changed_pages() & streams.common()
        self.kept = Reservation(self.pool)
        if self.wait:
            need = int(self.more.sum())
            need += 0 if self.copies is None else int(self.copies.sum())
            if need > streams.reservation.pages:
                self.pool.ensure(need - streams.reservation.pages)
            self.kept.take(need)
        self._set_pending(True)

    # the plan

    def _who_stays(self) -> Tensor:
        """Which stored tokens live on, bool `[R, S]`."""
        until = self.streams.lifetimes() if self.until is None else self.until
        return self.streams.alive(until, self.seen)

    def _who_enters(self) -> Tensor:
        """Which new tokens are stored, bool `[R, count]`; padding has position NEVER."""
        if self.new is None:
            return self.pool.users.new_zeros(len(self.streams.table), 0, dtype=torch.bool)
        arriving = self.new.evict_at.view(len(self.streams.table), self.count)
        stored = self.new.position.view_as(arriving) < arriving
        return self.streams.alive(arriving, self.seen) & stored

    def _count_pages(self, stays: Tensor, enters: Tensor) -> None:
        page_size = self.pool.page_size
        self.have = (self.streams.table >= 0).sum(1)
        self.keep = -(-(stays.sum(1) + enters.sum(1)) // page_size)
        if self.wait:
            self.more = (self.keep - self.have).clamp(min=0)
            self.most, self.width = (int(x.max()) if len(x) else 0 for x in (self.more, self.keep))
            return
        # without a look at the values: no page goes back, and every stream may take the most
        self.keep = self.keep.maximum(self.have)
        self.more = (self.keep - self.have).clamp(min=0)
        self.most, self.width = -(-self.count // page_size), self.streams.width

    def _find_places(self, stays: Tensor, enters: Tensor) -> None:
        """New tokens fill holes: the n-th token takes the n-th hole, those that move come first."""
        page_size = self.pool.page_size
        slots = max(self.width, self.streams.width) * page_size
        stays = pad(stays, [0, slots - stays.shape[1]])
        inside = torch.arange(slots, device=stays.device) < self.keep[:, None] * page_size
        holes = (inside & ~stays).cumsum(1)
        outside = stays & ~inside
        self.moves = _Moves(outside, holes) if self.wait and bool(outside.any()) else None
        moving = 0 if self.moves is None else self.moves.count[:, None]
        turn = moving + enters.cumsum(1)
        self.place = torch.where(enters, torch.searchsorted(holes, turn), -1)

    def _changed_pages(self) -> Tensor:
        """Pages that the streams have, that change and stay, bool `[R, width]`."""
        streams, table = self.streams, self.streams.table
        columns = max(self.width, streams.width)
        changed = torch.zeros(len(table), columns + 1, dtype=torch.bool, device=table.device)
        if self.until is not None:
            differs = streams.lifetimes() != self.until
            changed[:, : streams.width] = differs.view(*table.shape, self.pool.page_size).any(2)
        places = [self.place] if self.moves is None else [self.place, self.moves.place]
        for place in places:
            column = torch.where(place < 0, columns, place // self.pool.page_size)
            changed.scatter_(1, column, True)
        keeps = torch.arange(streams.width, device=table.device) < self.keep[:, None]
        return changed[:, : streams.width] & keeps

    # its end

    def drop(self) -> None:
        """Gives back what it was promised."""
        self.kept.release()
        self._set_pending(False)

    @lasting
    def apply(self) -> None:
        """Makes the change."""
        streams, pool = self.streams, self.pool
        self.drop()
        if self.wait:
            streams.reservation.release()
        if self.copies is not None:
            streams.unshare(self.copies)
        if self.until is not None:
            # only pages that stay: those that go back may still be another cache's
            streams.put_back(self.until, pool.evict_at, self.keep)
        streams.lease.widen(self.width)
        if self.most:
            self._take_pages()
        streams.width = max(self.width, streams.width)
        if self.moves is not None:
            self._move(self.moves)
        if self.new is not None:
            stream = torch.arange(len(self.place), device=self.place.device)[:, None]
            slots = streams.slots(stream.expand_as(self.place), self.place)
            pool.scatter(slots.flatten(), self.new, wait=self.wait)
        if self.wait:
            self._return_pages()
        else:
            streams.reservation.steps -= self.count
        streams.seen.copy_(self.seen)
        streams.turn += 1
        if self.origin is not None:
            self.origin.turn += 1

    def _set_pending(self, pending: bool) -> None:
        self.streams.pending = pending
        if self.origin is not None:
            self.origin.pending = pending

    def _take_pages(self) -> None:
        """Appends `more` free pages to every stream, and empties them."""
        pool, table = self.pool, self.streams.lease.table
        step = torch.arange(self.most, device=table.device)
        wanted = step < self.more[:, None]
        turn = (self.more.cumsum(0) - self.more)[:, None] + step
        page = torch.where(wanted, pool.free(turn), -1).to(torch.int32)
        column = torch.where(wanted, self.have[:, None] + step, table.shape[1] - 1)
        table.scatter_(1, column, page)
        pool.count_users(page, 1)
        emptied = torch.where(page < 0, pool.scratch, page).flatten().long()
        pool.evict_at.index_fill_(0, emptied, 0)

    def _move(self, moves: _Moves) -> None:
        """Moves tokens, with their lowered lifetimes, from pages at the end into holes."""
        streams = self.streams
        moved = self.pool.gather(streams.slots(moves.stream, moves.source))
        if self.until is not None:
            moved = moved._replace(evict_at=self.until[moves.stream, moves.source])
        self.pool.scatter(streams.slots(moves.stream, moves.target), moved, wait=True)

    def _return_pages(self) -> None:
        """Gives the pages behind `keep` back, and slabs that became empty."""
        pool, streams = self.pool, self.streams
        less = bool((self.keep < self.have).any())
        if less:
            gone = torch.arange(streams.width, device=self.keep.device) >= self.keep[:, None]
            pool.count_users(torch.where(gone, streams.table, -1), -1)
            streams.table.masked_fill_(gone, -1)
        if self.freed or less:
            pool.shrink()
        streams.width = self.width
        if not streams.private:
            streams.private = not bool(streams.common().any())


@final
class _Moves:
    """Tokens behind the pages that a stream keeps, and the holes that they move into.

    Attributes:
        count: int64 `[R]`, how many move.
        place: int64 `[R, n]`, where they go, -1 for none.
        stream, source, target: int64, one entry per token: its stream, and its place before and
            after.
    """

    def __init__(self, moves: Tensor, holes: Tensor) -> None:
        self.count = moves.sum(1)
        most = int(self.count.max()) if len(self.count) else 0
        turn = torch.arange(1, most + 1, device=holes.device).expand(len(holes), -1)
        self.place = torch.searchsorted(holes, turn.contiguous())
        self.stream, self.source = moves.nonzero().unbind(1)
        self.target = self.place[self.stream, moves.cumsum(1)[self.stream, self.source] - 1]
        self.place = torch.where(turn <= self.count[:, None], self.place, -1)
