"""The rows of a cache: which pages each has, and what stands in them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks.cache.pool import Pool

P = ParamSpec("P")
T = TypeVar("T")


def lasting(function: Callable[P, T]) -> Callable[P, T]:
    """Runs it without gradient and out of inference mode: what it makes or changes may be changed in any mode later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@final
class Lease:
    """The pages that the rows of one cache hold, given back when the last handle is gone.

    Attributes:
        table: int32 `[R, C + 1]`, pages of a row: first those it has, then -1; nobody reads the last column.
        promised: pages of the pool kept for the rows' next tokens.
    """

    def __init__(self, pool: Pool, table: Tensor) -> None:
        self.pool, self.table, self.promised = pool, pad(table, [0, 1], value=-1), 0

    def widen(self, columns: int) -> None:
        """Makes room in the table."""
        missing = columns - (self.table.shape[1] - 1)
        if missing > 0:
            room = max(missing, self.table.shape[1] // 2) + 1
            self.table = pad(self.table[:, :-1], [0, room], value=-1)

    def unpromise(self) -> None:
        """Keeps no more pages than it uses."""
        self.pool.promised -= self.promised
        self.promised = 0

    def end(self) -> None:
        """Gives everything back when the pool next looks.

        No tensor is touched: the garbage collector calls this at any time, in a graph's capture or a trace of another.
        """
        self.unpromise()
        self.pool.returned.append(self.table)


@final
class Rows:
    """What all handles of a cache share; a row is a (sequence, head), R = N * H of them, S slots each.

    Attributes:
        seen: int32 `[N]`, tokens seen: what lives no longer than that is a hole, to be filled again.
        heads: H.
        width: columns of the table that may hold a page; S = width * page_size.
        credit: so many more tokens fit without a look at the device.
        private: no page has another user.
        pending: a transaction has still to change them.
        turn: counts the changes; a handle of another turn is spent.
        end: gives all pages back; called once, at the latest with the last handle.
    """

    def __init__(
        self, pool: Pool, table: Tensor, seen: Tensor, heads: int, *, private: bool = True
    ) -> None:
        """table: int32 `[R, M]`, of pages that were listed for these rows."""
        self.pool, self.seen, self.heads, self.private = pool, seen, heads, private
        self.lease, self.width = Lease(pool, table), table.shape[1]
        self.end = weakref.finalize(self, self.lease.end)
        self.end.atexit = False
        self.credit = self.turn = 0
        self.pending = False

    @property
    def sequences(self) -> int:
        """N."""
        return self.seen.shape[0]

    @property
    def table(self) -> Tensor:
        """int32 `[R, width]`."""
        return self.lease.table[:, : self.width]

    def position(self) -> Tensor:
        """Of every slot, `[R, S]`; a hole still names the token that it held."""
        return self.pool.position[self.pool.listed(self.table)].flatten(1)

    def lifetimes(self) -> Tensor:
        """Of every slot, `[R, S]`; 0 where there is no page."""
        return self.pool.evict_at[self.pool.listed(self.table)].flatten(1)

    def put_back(self, until: Tensor, evict_at: Tensor, keep: Tensor | None = None) -> Tensor:
        """Writes lifetimes `[R, S]` into those of the pool, `[P + 2, page_size]`, of the first keep `[R]` pages."""
        there = self.table >= 0
        if keep is not None:
            there &= torch.arange(self.width, device=keep.device) < keep[:, None]
        page = torch.where(there, self.table, self.pool.waste).flatten().long()
        return evict_at.index_copy_(0, page, until.reshape(-1, self.pool.page_size))

    def alive(self, until: Tensor, seen: Tensor | None = None) -> Tensor:
        """Which lifetimes `[R, ...]` reach the query after those seen."""
        seen = self.seen if seen is None else seen
        return until > seen.repeat_interleave(self.heads)[:, None]

    def common(self) -> Tensor:
        """Which pages have another user, `[R, width]`."""
        if self.private:
            return torch.zeros_like(self.table, dtype=torch.bool)
        return (self.pool.users[self.pool.listed(self.table)] > 1) & (self.table >= 0)

    def slots(self, row: Tensor, place: Tensor) -> Tensor:
        """Slots of the pool at places of rows, any shape, int64; -1 stays -1."""
        if self.width == 0:
            return torch.full_like(place, -1)
        size = self.pool.page_size
        page = self.table[row, place.clamp(min=0) // size].long()
        return torch.where(place < 0, -1, page * size + place % size)

    def unshare(self, copies: Tensor) -> None:
        """Takes copies of some pages, bool `[R, width]`, in their place; waits for the device."""
        if not bool(copies.any()):
            return
        pool, old = self.pool, self.table[copies]
        new = pool.free(torch.arange(len(old), device=old.device))
        pool.write(pool.slots(new).flatten(), pool.read(pool.slots(old).flatten()), wait=True)
        self.table[copies] = new.to(torch.int32)
        pool.list(new, 1)
        pool.list(old, -1)

    def stop_reserving(self) -> None:
        """From now on the device may be waited for."""
        self.lease.unpromise()
        self.credit = 0

    # by row [R, S, ...], by sequence [N, S, H, ...]

    def by_row(self, x: Tensor) -> Tensor:
        """`[N, T, Hkv, ...]` -> `[R, T, W, ...]`."""
        y: Tensor = x.unflatten(2, (self.heads, self.pool.heads)).transpose(1, 2).flatten(0, 1)
        return y

    def by_sequence(self, x: Tensor) -> Tensor:
        """`[R, S]` -> `[N, S, H]`."""
        y: Tensor = x.view(self.sequences, self.heads, x.shape[1]).mT
        return y

    def for_heads(self, x: Tensor) -> Tensor:
        """`[N, S, H]` -> `[N, S, Hkv]`."""
        return x if self.pool.heads == 1 else x.repeat_interleave(self.pool.heads, 2)


def ranked(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Row and entry of the first counts[row] entries of every row of `order`, one after the other."""
    row, rank = (
        (torch.arange(order.shape[1], device=order.device) < counts[:, None]).nonzero().unbind(1)
    )
    return row, order[row, rank]
