"""A cache together with the new tokens of a call, which attention reads before they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor

from hamblocks.cache.append import append
from hamblocks.cache.changes import Change, apply_or_queue
from hamblocks.cache.commit import Commit
from hamblocks.cache.placed import placed
from hamblocks.cache.pool import Tokens
from hamblocks.cache.streams import Streams, Unallocated, lasting
from hamblocks.keys import DenseKeys, PagedKeys
from hamblocks_ops import NEVER, Pages, unpage
from hamblocks_ops.append import runs, show
from hamblocks_ops.arguments import check_tensor, values_are_checked
from hamblocks_ops.context import CHECKED
from hamblocks_ops.paged_attention import PageMemo
from hamblocks_ops.precision import detached

if TYPE_CHECKING:
    from hamblocks.cache.store import KVCache


class Stored(NamedTuple):
    """The tokens in a cache, padded to the head with the most slots.

    Attributes:
        k: `[N, L, Hkv, D]`, keys as attention reads them (normalised, rotated).
        v: `[N, L, Hkv, D]`.
        position: int32 `[N, L, Hkv]`, in any order; NEVER where there is no token, so that no query
            sees the entry.
        evict_at: int32 `[N, L, Hkv]`, 0 where there is no token.
        logit_bias: float32 `[N, L, Hkv]`, or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None


class CallTokens(NamedTuple):
    """The new tokens of a call.

    Attributes:
        k: `[N, T, Hkv, D]`.
        v: `[N, T, Hkv, D]`.
        position: int32 `[N, T]`; NEVER for padding, which no query sees and no commit stores.
        evict_at: int32 `[N, T, H]`, by stream.
        logit_bias: `[N, T, Hkv]` or `[N, T, 1]`, or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None


@final
class Extension:
    """A cache together with the new tokens and the lowered lifetimes of one call.

    `KVCache.extend` makes it. The cache does not change until `commit`; an extension that is never
    committed leaves the cache as it was.
    """

    def __init__(
        self,
        streams: Streams,
        new: CallTokens,
        until: Tensor | None,
        query_position: Tensor,
        origin: Unallocated | None,
        check: Callable[[], None],
        following: Callable[[Streams], KVCache],
    ) -> None:
        """Called by the cache only.

        Args:
            streams: the stored tokens.
            new: the new tokens.
            until: int32 `[R, S]`, lowered lifetimes of the stored tokens; None: unchanged.
            query_position: int32 `[N, T]`, -1 for padding.
            origin: the `Unallocated` that the streams were made from, if nothing was stored yet.
            check: raises if the handle that was extended is spent.
            following: makes the handle that `commit` returns.
        """
        self._check, self._following = check, following
        self._streams, self._new, self._until, self._origin = streams, new, until, origin
        self._page: Pages | None = None
        self._query_position = query_position

    @property
    def keys(self) -> PagedKeys:
        """The keys that attention reads: the stored tokens and the new ones."""
        self._check()
        new = self._new
        return PagedKeys(
            self._query_position,
            pages=self._pages,
            # None lets `paged_attention` find out from the page table
            shared=False if self._streams.private else None,
            learns=any(x is not None and x.requires_grad for x in (new.k, new.v, new.logit_bias)),
            not_in_place=self._not_in_place(),
            copy=self._dense,
        )

    def stored(self) -> Stored:
        """A padded copy of the stored tokens, with lowered lifetimes, and of the new tokens."""
        self._check()
        old, new = stored(self._streams, self._until), self._stored_new()
        k, v, position, until = (
            torch.cat([x, own], 1) for x, own in zip(old[:4], new[:4], strict=True)
        )
        bias = None
        if old.logit_bias is not None and new.logit_bias is not None:
            bias = torch.cat([old.logit_bias, new.logit_bias], 1)
        return Stored(k, v, position, until, bias)

    @lasting
    def commit(self, seen: Tensor) -> KVCache:
        """Stores the new tokens and lifetimes; frees those that no query from `seen` on sees.

        Args:
            seen: int32 `[N]`, tokens of every sequence that were seen, those of this call included.

        Returns:
            The next handle; the handle that was extended is spent.

        Raises:
            ValueError: the pool would exceed `max_pages`; the cache is as it was.
        """
        if not CHECKED.get():
            check_tensor("seen", seen, "[N]", [self._streams.sequences])
        page = Pages(*(None if x is None else detached(x) for x in self._by_stream()))  # type: ignore[arg-type]
        with self._streams.lock:
            # under the lock: another thread may be about to commit to the same handle
            self._check()
            # made before the change is applied, because a transaction may apply it later
            following = self._following(self._streams)
            change: Change | None = None
            if self._until is None and self._origin is None:
                change = append(self._streams, seen, page)
            if change is None and self._origin is None:
                change = placed(self._streams, seen, self._until, page)
            if change is None:
                k, v, position, evict_at, bias = page
                tokens = Tokens(
                    k.flatten(0, 1),
                    v.flatten(0, 1),
                    position.flatten(),
                    evict_at.flatten(),
                    None if bias is None else bias.flatten(),
                )
                change = Commit(self._streams, seen, self._until, tokens, self._origin)
            apply_or_queue(change)
        return following

    def _not_in_place(self) -> str | None:
        # A page has one lifetime per slot, so two streams that list the same page cannot have
        # different lifetimes in it.
        if self._until is None or self._streams.private:
            return None
        return (
            "a page that several caches share cannot show lifetimes that were lowered for one of "
            "them (fork or reorder, then a selector that evicts)"
        )

    def _pages(self) -> tuple[list[Pages], Tensor, PageMemo | None]:
        """Slabs and page table: the pool's slabs, then a slab of new tokens, one page a stream."""
        streams, pool, new = self._streams, self._streams.pool, self._by_stream()
        # The lock is needed for a consistent list of slabs. They are read without it: growing and
        # shrinking the pool leave the memory of slabs that are in use as it is.
        with streams.lock:
            if self._until is None and values_are_checked(streams.seen):
                listing = streams.listing()
                # a memo serves calls with as many new tokens: those that decode one by one
                memo = listing.memo if new.k.shape[1] == 1 else None
                return [*pool.views().slabs, new], listing.table, memo
            evict_at = None
            if self._until is not None:
                # A tensor of its own, since the pool must not change before the commit. Only pages
                # of these streams are written and read, so the cost does not depend on the size of
                # the pool.
                evict_at = torch.empty_like(pool.evict_at)
                if runs(evict_at):
                    show(streams.table, self._until, evict_at, streams.width)
                else:
                    streams.put_back(self._until, evict_at)
            slabs, own, table = [*pool.slabs(evict_at), new], streams.own_pages(), streams.table
        # pages are numbered through all slabs, so those of the new tokens follow those of the pool
        table = torch.cat([table, own[:, None]], 1)
        return slabs, table.view(streams.sequences, streams.heads, table.shape[1]), None

    def _by_stream(self) -> Pages:
        """The new tokens, one page per stream; computed once, for attention and for the commit."""
        if self._page is None:
            one = self._new.k.shape[1] == 1 and values_are_checked(self._streams.seen)
            self._page = self._one_by_stream() if one else self._many_by_stream()
        return self._page

    def _many_by_stream(self) -> Pages:
        streams, new = self._streams, self._stored_new()
        k, v, position, evict_at = (streams.by_stream(x) for x in new[:4])
        bias = None if new.logit_bias is None else streams.by_stream(new.logit_bias)[..., 0]
        return Pages(k, v, position[..., 0], evict_at[..., 0], bias)

    def _one_by_stream(self) -> Pages:
        """One token per sequence, on a CPU: nothing is transposed."""
        streams, (k, v, position, evict_at, bias) = self._streams, self._new
        with streams.lock:
            sequence = streams.listing().sequence
        page = len(sequence), 1, streams.pool.heads, streams.pool.head_dim
        if bias is not None:
            bias = bias.expand(-1, -1, streams.heads) if bias.shape[2] == 1 else bias
            bias = bias.reshape(len(sequence), 1)
        return Pages(
            k.reshape(page),
            v.reshape(page),
            position.index_select(0, sequence),
            evict_at.reshape(len(sequence), 1),
            bias,
        )

    def _stored_new(self) -> Stored:
        """The new tokens as `stored` has them."""
        streams, (k, v, position, evict_at, bias) = self._streams, self._new
        kv_heads = k.shape[2]
        bias = None if bias is None else bias.expand(-1, -1, kv_heads)
        position = position[..., None].expand(-1, -1, kv_heads)
        return Stored(k, v, position, streams.for_heads(evict_at), bias)

    def _dense(self) -> DenseKeys:
        k, v, position, evict_at, bias = self.stored()
        return DenseKeys(
            k,
            v,
            position=position,
            evict_at=evict_at,
            logit_bias=bias,
            query_position=self._query_position,
        )


def stored(streams: Streams, until: Tensor | None = None) -> Stored:
    """A padded copy of the tokens that streams hold.

    Args:
        streams: the streams.
        until: int32 `[R, S]`, lifetimes to use instead of the stored ones.
    """
    with streams.lock:
        table = streams.table.view(streams.sequences, streams.heads, streams.width)
        k, v, _, _, bias = unpage(streams.pool.slabs(), table)
        until = streams.lifetimes() if until is None else until
        # a hole keeps the position and lifetime of its last token: hide it from queries
        alive = streams.alive(until)
        position, until = (
            streams.for_heads(streams.by_sequence(x))
            for x in (streams.position().where(alive, NEVER), until.where(alive, 0))
        )
    return Stored(k, v, position, until, None if bias is None else streams.for_heads(bias))
