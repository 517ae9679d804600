"""One change of a cache: which tokens stay, move and enter, and which pages are taken or freed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks.cache.pool import Reservation, Tokens
from hamblocks.cache.streams import Streams, Unallocated, lasting


@final
class Commit:
    """A change of a cache, planned by the constructor and applied later.

    The plan counts pages but does not choose them: until it is applied, another cache may take
    pages of the same pool. Whoever plans holds the lock of the pool; `apply` and `drop` take it.
    Planning waits for the device unless pages were reserved. With reserved
    pages, new tokens fill holes, but no token moves and no page is freed, because both would need
    values from the device.

    A hole is a slot of a stream's page without a living token.

    Attributes (of the plan; R streams, S slots):
        count: new tokens per stream, padding included.
        wait: whether the device is waited for.
        have, keep, more: int64 `[R]`, pages of a stream now, pages afterwards, pages to take.
        most: the largest entry of `more`; an upper bound if the device is not waited for.
        width: columns of the page table afterwards.
        moves: tokens that move into holes, so that pages at the end become free; or None.
        place: int64 `[R, count]`, the slot of its stream that a new token takes; -1: not stored.
        copies: bool `[R, width]`, pages to copy before the change, because another stream lists
            them too; or None.
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
            streams: the streams to change.
            seen: int32 `[N]`, tokens seen after the change.
            until: int32 `[R, S]`, lifetimes after a selector lowered some; None: unchanged.
            new: R * T tokens, stream after stream; padding has position NEVER.
            origin: the `Unallocated` that became the streams, if this is their first change.

        Raises:
            ValueError: the pool would exceed `max_pages`, or a CUDA graph was replayed past the
                reservation; nothing was changed.
        """
        self.streams, self.pool, self.origin = streams, streams.pool, origin
        self.seen, self.until, self.new = seen, until, new
        self.count = 0
        if new is not None and len(streams.table):
            self.count = len(new.evict_at) // len(streams.table)
        # A reservation is enough for `steps` more tokens if no page is shared. Shared pages have to
        # be copied first, and how many that are depends on values on the device.
        self.wait = streams.reservation.steps < max(self.count, 1) or not streams.private
        if self.wait:
            streams.reservation.settle(streams.seen)
        # if pages became free here, `_return_pages` tries to shrink the pool
        self.freed = self.wait and self.pool.collect()
        stays, enters = self._who_stays(), self._who_enters()
        self._count_pages(stays, enters)
        self._find_places(stays, enters)
        self.copies = None if streams.private else self._changed_pages() & streams.common()
        self.kept = Reservation(self.pool)
        if self.wait:
            # Pages are reserved now, so that applying cannot fail. The reservation of the streams
            # is released when the change is applied, so its pages count as available.
            need = int(self.more.sum())
            need += 0 if self.copies is None else int(self.copies.sum())
            if need > streams.reservation.pages:
                self.pool.ensure(need - streams.reservation.pages)
            self.kept.take(need)
        self._set_pending(True)

    # the plan

    def _who_stays(self) -> Tensor:
        """Which stored tokens stay, bool `[R, S]`."""
        until = self.streams.lifetimes() if self.until is None else self.until
        return self.streams.alive(until, self.seen)

    def _who_enters(self) -> Tensor:
        """Which new tokens are stored, bool `[R, count]`.

        A token that is evicted by the end of the call is never written. Padding has position NEVER,
        which is not below any lifetime.
        """
        if self.new is None:
            return self.pool.users.new_zeros(len(self.streams.table), 0, dtype=torch.bool)
        arriving = self.new.evict_at.view(len(self.streams.table), self.count)
        stored = self.new.position.view_as(arriving) < arriving
        return self.streams.alive(arriving, self.seen) & stored

    def _count_pages(self, stays: Tensor, enters: Tensor) -> None:
        streams, page_size = self.streams, self.pool.page_size
        self.have = (streams.table >= 0).sum(1)
        self.keep = -(-(stays.sum(1) + enters.sum(1)) // page_size)  # rounded up
        if self.wait:
            self.more = (self.keep - self.have).clamp(min=0)
            self.most, self.width = (int(x.max()) if len(x) else 0 for x in (self.more, self.keep))
            return
        # Without reading values: no page is returned, and every stream is assumed to take as many
        # pages as `count` tokens can need. `Streams.reserve` has widened the table for them.
        # A replayed CUDA graph repeats this without the host, which counts the steps. After the
        # last reserved page it gets no other: `_find_places` then finds no hole, and the token is
        # dropped. `Reservation.settle` reports that.
        self.keep = torch.clamp(self.keep, self.have, streams.reservation.most_pages)
        self.more = (self.keep - self.have).clamp(min=0)
        self.most, self.width = -(-self.count // page_size), streams.width

    def _find_places(self, stays: Tensor, enters: Tensor) -> None:
        """Assigns holes: the n-th token takes the n-th hole, moving tokens before new ones.

        `keep` pages have room for all tokens that stay or enter, so there are enough holes, except
        in a CUDA graph that is replayed past a reservation. There a token without a hole gets the
        slot after the last one, which `Streams.slots` turns into -1.
        """
        page_size = self.pool.page_size
        slots = max(self.width, self.streams.width) * page_size
        stays = pad(stays, [0, slots - stays.shape[1]])
        inside = torch.arange(slots, device=stays.device) < self.keep[:, None] * page_size
        # holes[r, s] counts the holes up to and including slot s, so searchsorted(holes, n) is the
        # slot of the n-th hole (from 1)
        holes = (inside & ~stays).cumsum(1)
        # living tokens in pages that will be returned; none if `keep` is at least `have`
        outside = stays & ~inside
        self.moves = _Moves(outside, holes) if self.wait and bool(outside.any()) else None
        moving = 0 if self.moves is None else self.moves.count[:, None]
        turn = moving + enters.cumsum(1)
        self.place = torch.where(enters, torch.searchsorted(holes, turn), -1)

    def _changed_pages(self) -> Tensor:
        """Existing pages that stay and whose content changes, bool `[R, width]`."""
        streams, table = self.streams, self.streams.table
        columns = max(self.width, streams.width)
        # the extra last column absorbs tokens that go nowhere (place -1)
        changed = torch.zeros(len(table), columns + 1, dtype=torch.bool, device=table.device)
        if self.until is not None:
            differs = streams.lifetimes() != self.until
            changed[:, : streams.width] = differs.view(*table.shape, self.pool.page_size).any(2)
        places = [self.place] if self.moves is None else [self.place, self.moves.place]
        for place in places:
            column = torch.where(place < 0, columns, place // self.pool.page_size)
            changed.scatter_(1, column, True)
        # pages that are returned need no copy, and pages beyond the old width are new
        keeps = torch.arange(streams.width, device=table.device) < self.keep[:, None]
        return changed[:, : streams.width] & keeps

    # the end of the change: dropped or applied

    def drop(self) -> None:
        """Releases the pages that were reserved for the change."""
        with self.pool.lock:
            self.kept.release()
            self._set_pending(False)

    @lasting
    def apply(self) -> None:
        """Makes the change."""
        # in one step for other threads: they see the cache either before or after the change
        with self.pool.lock:
            streams, pool = self.streams, self.pool
            self.drop()  # the reserved pages are taken from the pool below
            if self.wait:
                streams.reservation.release()
            # copy shared pages before the first write: other streams must not see the change
            if self.copies is not None:
                streams.unshare(self.copies)
            if self.until is not None:
                # only in pages that stay: a page that is returned may be listed by another stream
                streams.put_back(self.until, pool.evict_at, self.keep)
            streams.lease.widen(self.width)
            if self.most:
                self._take_pages()
            streams.width = max(self.width, streams.width)
            # moves read slots of pages that are returned, so they come before `_return_pages`
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
            streams.relisted()
            streams.seen.copy_(self.seen)
            # all older handles are spent, also those made before the streams were allocated
            streams.turn += 1
            if self.origin is not None:
                self.origin.turn += 1

    def _set_pending(self, pending: bool) -> None:
        self.streams.pending = pending
        if self.origin is not None:
            self.origin.pending = pending

    def _take_pages(self) -> None:
        """Appends `more` free pages to the table of every stream, and marks their slots empty."""
        pool, table = self.pool, self.streams.lease.table
        step = torch.arange(self.most, device=table.device)
        wanted = step < self.more[:, None]
        # Pages are handed out in the order of streams: a stream takes those after the pages of all
        # streams before it. Unwanted entries are -1 and go to the last column of the table.
        turn = (self.more.cumsum(0) - self.more)[:, None] + step
        page = torch.where(wanted, pool.free(turn), -1).to(torch.int32)
        column = torch.where(wanted, self.have[:, None] + step, table.shape[1] - 1)
        table.scatter_(1, column, page)
        pool.count_users(page, 1)
        # a used page still holds the lifetimes of its old tokens; with lifetime 0 a slot is a hole
        emptied = torch.where(page < 0, pool.scratch, page).flatten().long()
        pool.evict_at.index_fill_(0, emptied, 0)

    def _move(self, moves: _Moves) -> None:
        """Moves tokens from pages that are returned into holes, with their lowered lifetimes."""
        streams = self.streams
        moved = self.pool.gather(streams.slots(moves.stream, moves.source))
        # `put_back` wrote lowered lifetimes only to the pages that stay
        if self.until is not None:
            moved = moved._replace(evict_at=self.until[moves.stream, moves.source])
        self.pool.scatter(streams.slots(moves.stream, moves.target), moved, wait=True)

    def _return_pages(self) -> None:
        """Returns the pages after the first `keep` of a stream, and slabs that became empty."""
        pool, streams = self.pool, self.streams
        less = bool((self.keep < self.have).any())
        if less:
            gone = torch.arange(streams.width, device=self.keep.device) >= self.keep[:, None]
            pool.count_users(torch.where(gone, streams.table, -1), -1)
            streams.table.masked_fill_(gone, -1)
        if self.freed or less:
            pool.shrink()
        streams.width = self.width
        # copies may have replaced the last shared page: then later changes need not wait for it
        if not streams.private:
            streams.private = not bool(streams.common().any())


@final
class _Moves:
    """Tokens after the pages that a stream keeps, and the holes that they move into.

    Attributes:
        count: int64 `[R]`, how many tokens of a stream move.
        place: int64 `[R, n]`, the holes that they take; -1 beyond `count`.
        stream, source, target: int64, one entry per moving token: its stream, and its slot in the
            stream before and after.
    """

    def __init__(self, moves: Tensor, holes: Tensor) -> None:
        """Assigns the first holes of a stream to its moving tokens.

        Args:
            moves: bool `[R, slots]`, the tokens that move.
            holes: int64 `[R, slots]`, number of holes up to and including each slot.
        """
        self.count = moves.sum(1)
        most = int(self.count.max()) if len(self.count) else 0
        turn = torch.arange(1, most + 1, device=holes.device).expand(len(holes), -1)
        self.place = torch.searchsorted(holes, turn.contiguous())
        self.stream, self.source = moves.nonzero().unbind(1)
        # the running count of moving tokens in the stream is the index of the hole
        self.target = self.place[self.stream, moves.cumsum(1)[self.stream, self.source] - 1]
        self.place = torch.where(turn <= self.count[:, None], self.place, -1)
