"""The pool of fixed-size pages that the streams of a cache take from and return to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from hamblocks.cache.forked import watch
from hamblocks_ops import Pages
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide

SLAB_MIN_PAGES = 16
"""Pages of the smallest slab. Smaller slabs would cost too many allocations."""


class Tokens(NamedTuple):
    """K tokens of any streams, as flat tensors.

    Attributes:
        k: `[K, W, D]`, for the W key/value heads of a stream.
        v: `[K, W, D]`.
        position: int32 `[K]`.
        evict_at: int32 `[K]`.
        logit_bias: float32 `[K]`, or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None


class _Views(NamedTuple):
    """Views of the tensors of a pool, made again when slabs are added or freed.

    Attributes:
        slabs: as `paged_attention` takes them.
        keys: k and v of every slab, `[slots, 1, W, D]`, its scratch page included.
        tables: positions, lifetimes and biases, `[slots, 1]`.
    """

    slabs: list[Pages]
    keys: list[tuple[Tensor, Tensor]]
    tables: list[Tensor]


@final
class Pool:
    """Pages of one layer, in slabs. A slab never moves, so growing copies no keys or values.

    A page holds `page_size` tokens of one stream: of one key/value head of a sequence, or of all
    heads if the layer decides for its heads together. A slot is an index into all pages:
    page * page_size + offset. Positions, lifetimes and biases are small, so each of them is one
    tensor that spans all slabs; growing the pool copies it.

    These tensors have two extra pages at the end, so that shapes never depend on values: an
    all-zero page that streams without a page point to, and a scratch page that absorbs masked
    writes. Each slab of keys and values has its own scratch page as its last page.

    Forks of a cache share a pool, and threads may use the forks at the same time. Whoever reads or
    writes the tables or the list of slabs holds `lock`: growing replaces these tensors, and a page
    is chosen in one step and marked as used in another. Reading the keys and values of one's own
    pages needs no lock: a page that two streams list is copied before either changes it.

    Attributes:
        lock: guards everything below, and the streams of the pool; reentrant.
        users: int32 `[P + 2]`, how many streams list a page.
        version: how often slabs were added or freed.
        promised: number of free pages that are reserved (see `Reservation`).
        returned: page tables `[R, C + 1]` of dead caches and their reservations, which `collect`
            takes back. The last column is not part of the table. Appending needs no lock.
    """

    def __init__(
        self,
        page_size: int,
        heads: int,
        head_dim: int,
        like: Tensor,
        *,
        logit_bias: bool,
        max_pages: int | None,
    ) -> None:
        """Makes an empty pool.

        Args:
            page_size: tokens in a page.
            heads: key/value heads in a page (W).
            head_dim: D.
            like: any tensor of the dtype and on the device of the keys.
            logit_bias: whether tokens have a logit bias.
            max_pages: upper limit of pages; None: no limit.
        """
        self.page_size, self.heads, self.head_dim, self.max_pages = (
            page_size,
            heads,
            head_dim,
            max_pages,
        )
        self.dtype, self.device = like.dtype, like.device
        self.lock = threading.RLock()
        watch(self)
        self.keys: list[tuple[Tensor, Tensor]] = []
        self.promised = self.version = 0
        self._views: _Views | None = None
        self.returned: list[tuple[Tensor, Reservation]] = []
        self.position = torch.zeros(2, page_size, dtype=torch.int32, device=like.device)
        self.evict_at = torch.zeros_like(self.position)
        self.bias = None
        if logit_bias:
            self.bias = torch.zeros(2, page_size, dtype=wide(like), device=like.device)
        self.users = torch.ones(2, dtype=torch.int32, device=like.device)

    @property
    def pages(self) -> int:
        """Pages in all slabs."""
        return self.users.shape[0] - 2

    @property
    def scratch(self) -> int:
        """Index of the scratch page."""
        return self.pages + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, and of positions, lifetimes, biases and user counts."""
        tables = (self.position, self.evict_at, self.users, self.bias)
        beside = sum(x.nbytes for x in tables if x is not None)
        return beside + sum(k.nbytes + v.nbytes for k, v in self.keys)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token of a stream: keys, values, position, lifetime and bias."""
        bias = 0 if self.bias is None else self.bias.element_size()
        return 2 * self.heads * self.head_dim * self.dtype.itemsize + 8 + bias

    def listed(self, table: Tensor) -> Tensor:
        """Page indices of a page table, int64; -1 becomes the index of the all-zero page."""
        return torch.where(table < 0, self.pages, table).long()

    def slabs(self, evict_at: Tensor | None = None) -> list[Pages]:
        """The slabs as `paged_attention` takes them; an empty pool has one slab without pages.

        Args:
            evict_at: lifetimes `[P + 2, page_size]` to use instead of those of the pool.
        """
        slabs, begin = [], 0
        evict_at = self.evict_at if evict_at is None else evict_at
        for k, v in self.keys or [self._slab(0)]:
            # without the scratch page of the slab, which the tensors of positions do not have
            own = slice(begin, begin + k.shape[0] - 1)
            bias = None if self.bias is None else self.bias[own]
            slabs.append(Pages(k[:-1], v[:-1], self.position[own], evict_at[own], bias))
            begin = own.stop
        return slabs

    def collect(self) -> bool:
        """Takes back the pages of dead caches, and returns whether there were any."""
        some = bool(self.returned)
        while self.returned:
            table, reservation = self.returned.pop()
            reservation.release()
            self.count_users(table[:, :-1], -1)
        return some

    def used(self) -> int:
        """Number of pages that at least one stream lists. Waits for the device."""
        self.collect()
        return int((self.users[:-2] > 0).sum())

    def ensure(self, pages: int) -> None:
        """Grows the pool until `pages` pages are free and not reserved. Waits for the device.

        Raises:
            ValueError: the pool would exceed `max_pages`.
        """
        used = self.used() + self.promised  # reserved pages are free, but not available
        missing = used + pages - self.pages
        if missing <= 0:
            return
        if self.max_pages is not None and used + pages > self.max_pages:
            expected = f"at least {used + pages} pages ({used} in use and {pages} more)"
            raise wrong("max_pages", expected, str(self.max_pages))
        # growing by half keeps the number of slabs, and of copies of the spanning tensors, small
        grown = max(missing, self.pages // 2, SLAB_MIN_PAGES)
        if self.max_pages is not None:
            grown = min(grown, self.max_pages - self.pages)
        self.keys.append(self._slab(grown))
        self.position, self.evict_at = (
            self._widened(x, grown) for x in (self.position, self.evict_at)
        )
        self.users = self._widened(self.users, grown)
        if self.bias is not None:
            self.bias = self._widened(self.bias, grown)
        self._slabs_changed()

    def _slab(self, pages: int) -> tuple[Tensor, Tensor]:
        shape = pages + 1, self.page_size, self.heads, self.head_dim
        # Kernels multiply slots that never held a token by weight 0. Zeros, because uninitialised
        # memory may hold NaN, and 0 * NaN is NaN.
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return k, v

    def _widened(self, x: Tensor, pages: int) -> Tensor:
        # the two extra pages stay last
        return torch.cat([x[:-2], x.new_zeros(pages, *x.shape[1:]), x[-2:]])

    def shrink(self) -> None:
        """Frees empty slabs at the end of the pool. Waits for the device.

        A slab is freed only if at least two thirds of the remaining pages are free, so that a pool
        with varying load does not allocate and free the same slab repeatedly.
        """
        self.collect()
        # A reservation does not say which pages it will take, so no slab is freed while any page is
        # reserved.
        while self.keys and self.promised == 0:
            rest = self.pages - (self.keys[-1][0].shape[0] - 1)
            if bool((self.users[rest:-2] > 0).any()) or (rest and 3 * self.used() > rest):
                return
            self.keys.pop()
            self.position, self.evict_at, self.users = (
                torch.cat([x[:rest], x[-2:]]) for x in (self.position, self.evict_at, self.users)
            )
            if self.bias is not None:
                self.bias = torch.cat([self.bias[:rest], self.bias[-2:]])
            self._slabs_changed()

    def _slabs_changed(self) -> None:
        self.version += 1
        self._views = None

    def views(self) -> _Views:
        """Views of all tensors. The caller holds the lock."""
        if self._views is None:
            with torch.inference_mode(False), torch.no_grad():
                tables = (self.position, self.evict_at, self.bias)
                self._views = _Views(
                    self.slabs(),
                    [(_by_slot(k), _by_slot(v)) for k, v in self.keys],
                    [_by_slot(x) for x in tables if x is not None],
                )
        return self._views

    def free(self, turn: Tensor) -> Tensor:
        """The turn-th free pages (from 0), int64.

        Pages with a low index come first, so that the last slabs become empty and can be freed.
        """
        # rank[p] counts the free pages up to and including p
        rank = (self.users[:-2] == 0).cumsum(0)
        return torch.searchsorted(rank, turn + 1)

    def count_users(self, pages: Tensor, change: int) -> None:
        """Adds `change` to the user counts of pages; the scratch page absorbs entries of -1."""
        some = torch.where(pages < 0, self.scratch, pages).flatten()
        self.users.index_add_(0, some.long(), torch.full_like(some, change, dtype=torch.int32))

    def slots(self, pages: Tensor) -> Tensor:
        """All slots of pages `[...]`, int64 `[..., page_size]`."""
        return pages.long()[..., None] * self.page_size + torch.arange(
            self.page_size, device=self.device
        )

    def gather(self, slot: Tensor) -> Tokens:
        """Copies the tokens in slots, int64 `[K]`. Waits for the device."""
        shape = len(slot), self.heads, self.head_dim
        k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for own, place, k_slab, v_slab in self._places(slot):
            k[own], v[own] = k_slab[place], v_slab[place]
        bias = None if self.bias is None else self.bias.flatten()[slot]
        return Tokens(k, v, self.position.flatten()[slot], self.evict_at.flatten()[slot], bias)

    def scatter(self, slot: Tensor, tokens: Tokens, *, wait: bool) -> None:
        """Writes tokens into slots.

        Args:
            slot: int64 `[K]`, all different except for -1; tokens with slot -1 are not stored.
            tokens: K tokens.
            wait: whether to wait for the device, so that each token is written to its slab only. If
                not, all tokens are written to every slab, and those of other slabs go to its
                scratch page.
        """
        for own, place, k_slab, v_slab in self._places(slot) if wait else self._all_places(slot):
            k_slab.index_copy_(0, place, tokens.k[own])
            v_slab.index_copy_(0, place, tokens.v[own])
        anywhere = torch.where(slot < 0, self.scratch * self.page_size, slot)
        tables = (
            (self.position, tokens.position),
            (self.evict_at, tokens.evict_at),
            (self.bias, tokens.logit_bias),
        )
        for table, values in tables:
            if table is not None and values is not None:
                table.view(-1).index_copy_(0, anywhere, values)

    def put(self, slots: list[int], new: Pages) -> None:
        """Writes one token per stream, on a CPU.

        Args:
            slots: all different except for -1; tokens with slot -1 are not stored.
            new: a page of one token for each stream.
        """
        views, begin, nowhere = self.views(), 0, self.scratch * self.page_size
        anywhere = torch.tensor(
            [nowhere if slot < 0 else slot for slot in slots], device=self.device
        )
        for k, v in views.keys:
            scratch = k.shape[0] - self.page_size  # the first slot of the slab's scratch page
            place = [slot - begin if 0 <= slot - begin < scratch else scratch for slot in slots]
            if min(place) < scratch:
                where = anywhere if place == slots else torch.tensor(place, device=self.device)
                k.index_copy_(0, where, new.k)
                v.index_copy_(0, where, new.v)
            begin += scratch
        values = (new.position, new.evict_at, new.logit_bias)
        for table, value in zip(views.tables, values, strict=False):
            assert value is not None
            table.index_copy_(0, anywhere, value)

    def _places(self, slot: Tensor) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, Tensor]]:
        """For each slab that has some of the slots: which ones, where in the slab, its k and v."""
        begin = 0
        for k, v in self.keys:
            end = begin + (k.shape[0] - 1) * self.page_size
            own = ((slot >= begin) & (slot < end)).nonzero()[:, 0]
            if len(own):
                yield own, slot[own] - begin, k.flatten(0, 1), v.flatten(0, 1)
            begin = end

    def _all_places(self, slot: Tensor) -> Iterator[tuple[Tensor | slice, Tensor, Tensor, Tensor]]:
        """As `_places`, without reading values, so that it can run in a CUDA graph.

        Every slab gets all tokens. Those of other slabs go to the first slot of its scratch page.
        """
        begin = 0
        for k, v in self.keys:
            end = begin + (k.shape[0] - 1) * self.page_size
            place = torch.where((slot >= begin) & (slot < end), slot - begin, end - begin)
            yield slice(None), place, k.flatten(0, 1), v.flatten(0, 1)
            begin = end


def _by_slot(x: Tensor) -> Tensor:
    """`[pages, page_size, ...]` -> `[slots, 1, ...]`."""
    return x.view(-1, 1, *x.shape[2:])


@final
class Reservation:
    """A number of pages reserved for the next tokens of a cache, or for a planned change.

    `steps` is counted by the host, which does not run when a CUDA graph is replayed. Two tensors on
    the device therefore bound what replays can do: a change never gives a stream more pages than
    `most_pages`, and whoever waits for the device compares the tokens seen with `end` (`settle`).

    Attributes:
        pages: reserved pages; `Pool.promised` is the sum over all reservations.
        steps: tokens per sequence that can still be stored without waiting for the device.
        total: `steps` when the pages were reserved.
        most_pages: int64 `[R]`, pages that each stream may have; None if `steps` was never set.
        end: int32 `[N]`, tokens seen when the reservation is used up; None likewise.
    """

    most_pages: Tensor | None
    end: Tensor | None

    def __init__(self, pool: Pool) -> None:
        self.pool, self.pages, self.steps, self.total = pool, 0, 0, 0
        self.most_pages = self.end = None

    def take(self, pages: int) -> None:
        """Reserves pages, instead of those reserved before. Call `Pool.ensure` first."""
        self.release()
        self.pages = pages
        self.pool.promised += pages

    def take_steps(self, steps: int, each: int, have: Tensor, seen: Tensor) -> None:
        """Reserves pages for `steps` more tokens per sequence.

        Args:
            steps: tokens per sequence.
            each: pages that a stream needs for them at most.
            have: int64 `[R]`, pages of the streams now.
            seen: int32 `[N]`, tokens seen now.
        """
        self.take(each * len(have))
        self.steps = self.total = steps
        self.most_pages, self.end = have + each, seen + steps

    def renew(self, sequences: Tensor, streams: Tensor) -> None:
        """Gives sequences that were emptied all of their reservation again, without waiting.

        Args:
            sequences: bool `[N]`.
            streams: bool `[R]`.
        """
        if self.most_pages is not None and self.end is not None and len(self.most_pages):
            each = self.pages // len(self.most_pages)
            self.most_pages.masked_fill_(streams, each)
            self.end.masked_fill_(sequences, self.total)

    def settle(self, seen: Tensor) -> None:
        """Takes the steps of replayed CUDA graphs into account. Waits for the device.

        Args:
            seen: int32 `[N]`, tokens seen now.

        Raises:
            ValueError: a sequence has seen more tokens than were reserved.
        """
        if self.end is None or not len(seen):
            return
        left = int((self.end - seen).min())
        if left < 0:
            raise wrong(
                "reserve",
                f"at most the {self.total} tokens per sequence that were reserved",
                f"{self.total - left} (a replayed CUDA graph went on; later tokens may be missing)",
            )
        self.steps = min(self.steps, left)

    def release(self) -> None:
        """Ends the reservation."""
        self.pool.promised -= self.pages
        self.pages = self.steps = self.total = 0
        self.most_pages = self.end = None
