"""The streams of a cache: which pages each has, and the tokens in them.

A stream is a (sequence, key/value head) pair, or a whole sequence if the layer decides for all
heads together. There are R = N * H streams with S slots each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks.cache.forked import watch
from hamblocks.cache.pool import Pool, Reservation
from hamblocks_ops.arguments import values_are_checked
from hamblocks_ops.paged_attention.layout import PageMemo

P = ParamSpec("P")
T = TypeVar("T")


def lasting(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function without gradients and outside of inference mode.

    A tensor that was made in inference mode cannot be changed in place outside of it later.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


@final
class Listing(NamedTuple):
    """What follows from a page table on a CPU, kept until the table or the pool's slabs change.

    Attributes:
        version: of the pool.
        private: whether each page was known to be listed by one stream only.
        page: int64 `[R * width]`, the listed pages (see `Pool.listed`).
        sequence: int64 `[R]`, the sequence of each stream.
        have: pages of each stream.
        table: int32 `[N, H, width + 1]`, the page table; its last column is a page for a call's new
            tokens, numbered after all pages of the pool.
        memo: what `paged_attention` computed from the slabs and this table.
    """

    version: int
    private: bool
    page: Tensor
    sequence: Tensor
    have: list[int]
    table: Tensor
    memo: PageMemo


@final
class Lease:
    """The pages of the streams of one cache, returned when the last handle is gone.

    Attributes:
        table: int32 `[R, C + 1]`, the page table: first the pages of a stream, then -1. The last
            column absorbs masked writes.
        reservation: pages of the pool reserved for the next tokens.
    """

    def __init__(self, pool: Pool, table: Tensor) -> None:
        self.pool, self.table = pool, pad(table, [0, 1], value=-1)
        self.reservation = Reservation(pool)

    def widen(self, columns: int) -> None:
        """Widens the table to at least this many columns."""
        missing = columns - (self.table.shape[1] - 1)
        if missing > 0:
            room = max(missing, self.table.shape[1] // 2) + 1
            self.table = pad(self.table[:, :-1], [0, room], value=-1)

    def end(self) -> None:
        """Queues table and reservation, so that `Pool.collect` takes back their pages.

        It touches no tensor, because the garbage collector may call it at any time, also while a
        CUDA graph is captured or a function is traced. It waits for no lock, because the collector
        may call it in a thread that holds the lock of another pool.
        """
        self.pool.returned.append((self.table, self.reservation))


@final
class Streams:
    """The data that all handles of a cache share.

    Attributes:
        seen: int32 `[N]`, tokens seen. A token with evict_at <= seen is a hole, which a new token
            may fill.
        heads: H, streams per sequence.
        width: columns of the page table that may hold a page; S = width * page_size.
        private: True if each page is known to be listed by one stream only.
        lock: the lock of the pool.
        pending: whether an open transaction has planned a change of these streams.
        turn: number of changes; a handle that was made for another turn is spent.
        end: returns all pages; called once, at the latest when the last handle is gone.
    """

    def __init__(
        self, pool: Pool, table: Tensor, seen: Tensor, heads: int, *, private: bool = True
    ) -> None:
        """Makes the streams of a page table.

        Args:
            pool: the pages.
            table: int32 `[R, M]`, a page table that the pool's user counts already include.
            seen: int32 `[N]`.
            heads: H.
            private: see the attributes.
        """
        self.pool, self.seen, self.heads, self.private = pool, seen, heads, private
        self.lock = pool.lock
        watch(self)
        self.lease, self.width = Lease(pool, table), table.shape[1]
        self.end = weakref.finalize(self, self.lease.end)
        self.end.atexit = False
        self.turn = 0
        self.pending = False
        self._listing: Listing | None = None
        self._own_pages: tuple[int, Tensor] | None = None

    @staticmethod
    def empty(pool: Pool, sequences: int, heads: int) -> Streams:
        """Streams without a page."""
        table = torch.empty(sequences * heads, 0, dtype=torch.int32, device=pool.device)
        seen = torch.zeros(sequences, dtype=torch.int32, device=pool.device)
        return Streams(pool, table, seen, heads)

    @property
    def sequences(self) -> int:
        """N."""
        return self.seen.shape[0]

    @property
    def table(self) -> Tensor:
        """int32 `[R, width]`."""
        return self.lease.table[:, : self.width]

    @property
    def reservation(self) -> Reservation:
        """Pages reserved for the next tokens."""
        return self.lease.reservation

    def position(self) -> Tensor:
        """Position in every slot, `[R, S]`; a hole keeps the position of its last token."""
        with self.lock:
            return self.pool.position[self.pool.listed(self.table)].flatten(1)

    def lifetimes(self) -> Tensor:
        """Lifetime in every slot, `[R, S]`; 0 where there is no page."""
        with self.lock:
            if not values_are_checked(self.seen):
                return self.pool.evict_at[self.pool.listed(self.table)].flatten(1)
            slots = self.width * self.pool.page_size
            until = self.pool.evict_at.index_select(0, self.listing().page)
            return until.view(self.sequences * self.heads, slots)

    @lasting
    def listing(self) -> Listing:
        """What follows from the page table, on a CPU. The caller holds the lock."""
        known, pool = self._listing, self.pool
        if known is not None and known[:2] == (pool.version, self.private):
            return known
        table, pages = self.table, pool.pages
        own = torch.arange(pages, pages + len(table), dtype=torch.int32, device=table.device)
        sequence = torch.arange(self.sequences, device=table.device)
        self._listing = Listing(
            pool.version,
            self.private,
            pool.listed(table).flatten(),
            sequence.repeat_interleave(self.heads),
            (table >= 0).sum(1).tolist(),
            torch.cat([table, own[:, None]], 1).view(self.sequences, self.heads, -1),
            PageMemo(),
        )
        return self._listing

    def own_pages(self) -> Tensor:
        """A page per stream for a call's new tokens, numbered after the pool's, int32 `[R]`."""
        pages, known = self.pool.pages, self._own_pages
        if known is None or known[0] != pages:
            table = self.table
            own = torch.arange(pages, pages + len(table), dtype=torch.int32, device=table.device)
            if table.is_cuda and torch.cuda.is_current_stream_capturing():
                return own  # it belongs to the graph
            known = self._own_pages = pages, own
        return known[1]

    def relisted(self) -> None:
        """Says that the page table has changed."""
        self._listing = None

    def put_back(self, until: Tensor, evict_at: Tensor, keep: Tensor | None = None) -> Tensor:
        """Writes lifetimes by stream into a tensor of lifetimes by page, and returns it.

        Args:
            until: `[R, S]`.
            evict_at: `[P + 2, page_size]`, written in place.
            keep: int64 `[R]`, write only the first `keep` pages of a stream; None: all.
        """
        there = self.table >= 0
        if keep is not None:
            there &= torch.arange(self.width, device=keep.device) < keep[:, None]
        page = torch.where(there, self.table, self.pool.scratch).flatten().long()
        return evict_at.index_copy_(0, page, until.reshape(-1, self.pool.page_size))

    def alive(self, until: Tensor, seen: Tensor | None = None) -> Tensor:
        """Which lifetimes `[R, S]` are later than `seen`: the next query sees these tokens."""
        seen = self.seen if seen is None else seen
        by_sequence = until.reshape(self.sequences, self.heads * until.shape[1])
        return (by_sequence > seen[:, None]).view(until.shape)

    def common(self) -> Tensor:
        """Which pages another stream lists too, bool `[R, width]`."""
        if self.private:
            return torch.zeros_like(self.table, dtype=torch.bool)
        return (self.pool.users[self.pool.listed(self.table)] > 1) & (self.table >= 0)

    def slots(self, stream: Tensor, place: Tensor) -> Tensor:
        """Converts slots of streams to slots of the pool, int64, any shape.

        -1 stays -1. The slot after the last one becomes -1 too.
        """
        size = self.pool.page_size
        # -1 // size is -1, the last column of the lease's table, which is always -1; so are the
        # columns after `width`
        page = self.lease.table[stream, place // size].long()
        return torch.where(page < 0, -1, page * size + place % size)

    def unshare(self, copies: Tensor) -> None:
        """Replaces some pages, bool `[R, width]`, by private copies. Waits for the device."""
        if not bool(copies.any()):
            return
        pool, old = self.pool, self.table[copies]
        new = pool.free(torch.arange(len(old), device=old.device))
        pool.scatter(pool.slots(new).flatten(), pool.gather(pool.slots(old).flatten()), wait=True)
        self.table[copies] = new.to(torch.int32)
        self.relisted()
        pool.count_users(new, 1)
        pool.count_users(old, -1)

    def reserve(self, steps: int) -> None:
        """Reserves the pages that `steps` more tokens per sequence need at most.

        Raises:
            ValueError: the pool would exceed `max_pages`, or a CUDA graph was replayed past an
                earlier reservation; nothing changed.
        """
        self.reservation.settle(self.seen)
        each = -(-steps // self.pool.page_size)  # rounded up
        wanted, common = each * len(self.table), self.common()
        self.pool.ensure(wanted + int(common.sum()) - self.reservation.pages)
        # copy all shared pages now, since finding them later would wait for the device
        self.reservation.release()
        self.unshare(common)
        self.private = True
        have = (self.table >= 0).sum(1)
        most = int(have.max()) if len(have) else 0
        self.lease.widen(most + each)
        self.width = most + each
        self.relisted()
        self.reservation.take_steps(steps, each, have, self.seen)

    # conversions between tensors by stream [R, S, ...] and by sequence [N, S, H, ...]

    def by_stream(self, x: Tensor) -> Tensor:
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


@final
class Unallocated:
    """The data that all handles of a cache share before the first token, when shapes are unknown.

    Attributes:
        sequences: N.
        page_size: tokens in a page.
        max_pages: upper limit of pages in the pool; None: no limit.
        steps: number of tokens per sequence to reserve pages for when the pool is made.
        lock: guards the handles; it becomes the lock of the pool.
        pending: as in `Streams`.
        turn: as in `Streams`.
    """

    def __init__(self, sequences: int, page_size: int, max_pages: int | None) -> None:
        self.sequences, self.page_size, self.max_pages = sequences, page_size, max_pages
        self.steps = self.turn = 0
        self.pending = False
        self.lock = threading.RLock()
        watch(self)

    def copy(self, sequences: int | None = None) -> Unallocated:
        """Another one with the same sizes."""
        sequences = self.sequences if sequences is None else sequences
        other = Unallocated(sequences, self.page_size, self.max_pages)
        other.steps = self.steps
        return other


def ranked(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Flattens the first counts[r] entries of every stream `order[r]`.

    Args:
        counts: int64 `[R]`.
        order: int64 `[R, S]`.

    Returns:
        The stream of every entry, and the entry, int64 `[sum(counts)]` each.
    """
    stream, rank = (
        (torch.arange(order.shape[1], device=order.device) < counts[:, None]).nonzero().unbind(1)
    )
    return stream, order[stream, rank]
