"""Which parts of the stored keys a block of queries reads, each key once.

The keys of a stream (one batch row, one key/value head) are of two kinds: those stored for good,
and those that will be evicted. A block of BLOCK_QUERIES queries reads

1. what it sees whole of the keys stored for good: a slice of one list, without a mask;
2. what it sees whole of the others: gathered for the block, without a mask;
3. what is left, which differs from query to query. Smaller blocks of EDGE_QUERIES queries repeat 1
   and 2 with it, and the few keys that begin or end within one of those take a mask.

Each of these is a `Part`, one call of SDPA. Streams that store about as many keys share a part, so
that no stream is charged for the keys of another.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.compact import compact
from hamblocks_ops.compact.listing import marked
from hamblocks_ops.packing import NEVER
from hamblocks_ops.selected_attention.lists import stored_by_the_end, times

BLOCK_QUERIES = 1024
"""Queries of a block: SDPA is fastest on many."""
EDGE_QUERIES = 256
"""Queries of a smaller block: a mask is cheapest on few."""
SMALL_PART_KEYS = 160
"""A block with so many keys to mask, or fewer, is not cut into smaller ones. So many keys that need
no mask, or fewer, are masked with the rest: a call of their own would cost more."""
HIDDEN = -(2.0**96)
"""Largest logit of an unseen key; finite even times any difference of two positions."""


class Batch(NamedTuple):
    """The tensors of a call: a batch, or one sequence of a packed batch."""

    q: Tensor
    k: Tensor
    v: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None
    query_position: Tensor
    key_position: Tensor

    def of(self, own: slice) -> Batch:
        """The tokens of one sequence of a packed batch."""
        return Batch(*(None if x is None else x[:, own] for x in self))  # type: ignore[arg-type]


class Tokens(NamedTuple):
    """Keys by number.

    Attributes:
        flat: int64 `[R, n]`, where in `[B, Tk, Hkv]` flattened a key stands: (b * Tk + j) * Hkv +
            h.
        filled: bool `[R, n]`, False for padding; None without padding.
    """

    flat: Tensor
    filled: Tensor | None


class Part(NamedTuple):
    """Keys for one call of SDPA: n keys for each of R streams.

    Attributes:
        streams: which streams, in the order of `Stored.order`.
        queries: which queries of the block.
        keys: slots of the list of keys stored for good, or keys by number.
        mask: `[R, 1, 1 or i, n]`, 0 for a key that is seen, HIDDEN or less for one that is not.
    """

    streams: slice
    queries: slice
    keys: slice | Tokens
    mask: Tensor | None

    @property
    def first(self) -> bool:
        """Whether no part before it has any of its queries: there is nothing to merge with."""
        return self.queries == slice(None) and isinstance(self.keys, slice) and self.keys.start == 0

    @property
    def own(self) -> tuple[slice, slice, slice]:
        """Where its queries stand in `[streams, G, queries]`."""
        return self.streams, slice(None), self.queries


class Stored:
    """The keys that are ever stored: of each stream those stored for good, then the others.

    Attributes:
        order: int64 `[R]`, the streams by how much they store for good, which is the order of all
            lists below. None if the streams store about as much and keep their order.
        position: int32 `[R, P + S]`; padding is never visible.
        until: int32 `[R, P + S]`, the lifetimes.
        token: int64 `[R, P + S]`, as `Tokens.flat`.
        lasting: P, the length of the lists of keys stored for good.
        begins: int32 `[R, P]`, the positions of those, ascending.
    """

    def __init__(self, call: Batch) -> None:
        key_position, evict_at = call.key_position, call.evict_at
        _, keys, kv_heads = evict_at.shape
        time = times(call.query_position, key_position, evict_at, None)
        ever = stored_by_the_end(time)
        stream = torch.arange(evict_at.shape[0] * kv_heads, device=evict_at.device)[:, None]
        lists = []
        for lasting in (True, False):
            # the other kind, and keys behind the last query, get a lifetime of no length
            own = ever & ((evict_at == NEVER) == lasting)
            stored = compact.unchecked(
                torch.where(own, evict_at, key_position), position=key_position
            )
            index, position, until = (x.flatten(0, 1) for x in stored[:3])
            token = (stream // kv_heads * keys + index) * kv_heads + stream % kv_heads
            # padding has the index T, which is the next batch row's first token
            token = token.masked_fill_(index == keys, 0)
            if lasting:
                self.lasting = index.shape[1]
                lengths = stored.lengths.flatten()
                alike = len(list(runs(lengths.tolist()))) == 1
                self.order = None if alike else lengths.argsort(descending=True)
                # a cache may hold its keys in another order than time; `by` searches in ascending
                # positions
                if bool((position.diff(dim=1) < 0).any()):
                    position, by_time = position.sort(dim=1)
                    token, until = token.gather(1, by_time), until.gather(1, by_time)
            kind = (position, until, token)
            lists.append(kind if self.order is None else tuple(x[self.order] for x in kind))
        self.position, self.until, self.token = (
            torch.cat(pair, 1) for pair in zip(*lists, strict=True)
        )
        self.begins = self.position[:, : self.lasting].contiguous()

    def tokens(self, streams: slice, slot: Tensor, filled: Tensor | None) -> Tokens:
        """The keys in some slots `[R, n]` of some streams."""
        return Tokens(self.token[streams].gather(1, slot), filled)

    def by(self, time: Tensor) -> Tensor:
        """How many keys that are stored for good have begun by a time `[R, n]`: int64 `[R, n]`."""
        return torch.searchsorted(self.begins, time.contiguous(), right=True)


class Rest(NamedTuple):
    """Keys that no part covers yet.

    Attributes:
        begin: of the keys stored for good, the first slot that is left.
        others: bool `[R, S]`, which of the other keys are left.
    """

    begin: int
    others: Tensor


class Span(NamedTuple):
    """Some queries of a block, in some streams.

    Attributes:
        streams: which streams.
        queries: which queries of the block.
        first: int32 `[R, 1]`, the time of the earliest query.
        last: int32 `[R, 1]`, that of the latest.
        begun: of every stream's keys stored for good, so many have begun by `first`.
        ended: no stream has more that have begun by `last`.
    """

    streams: slice
    queries: slice
    first: Tensor
    last: Tensor
    begun: int
    ended: int


class QueryBlock:
    """One block of queries, asked at time `[R, i]`, and the parts that they read."""

    def __init__(self, stored: Stored, time: Tensor, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        # the earliest and the latest query of each smaller block; the last one is filled up with
        # its last query
        edges = torch.cat([time, time[:, -1:].expand(-1, -time.shape[1] % EDGE_QUERIES)], 1)
        self.first, self.last = edges.unflatten(1, (-1, EDGE_QUERIES)).aminmax(dim=2)
        self.origin = self.first.amin(1, keepdim=True)
        self.asked = self.since(time, slice(None))

    def since(self, moment: Tensor, streams: slice) -> Tensor:
        """Time since the first query of a stream, times -HIDDEN.

        A key that begins n steps after a query then has the mask min(0, asked - begins) = n *
        HIDDEN, and one that has begun has 0: a mask is one difference, clamped.
        """
        passed: Tensor = moment.long() - self.origin[streams]
        return passed.to(self.dtype).mul_(-HIDDEN)

    def parts(self) -> Iterator[Part]:
        """The parts of every run of streams that store about as much."""
        begun, ended = self.stored.by(self.first), self.stored.by(self.last)
        for streams, most in runs(ended.amax(1).tolist()):
            begins, ends = begun[streams].amin(0).tolist(), ended[streams].amax(0).tolist()
            first, last = self.first[streams], self.last[streams]
            # what the whole block sees comes first; the smaller blocks then share the rest
            whole = Span(
                streams, slice(None), first.amin(1, True), last.amax(1, True), min(begins), most
            )
            others = torch.ones_like(
                self.stored.until[streams, self.stored.lasting :], dtype=torch.bool
            )
            around = yield from self._seen_by_all(whole, Rest(0, others))
            if most - around.begin <= SMALL_PART_KEYS and others.shape[1] == 0:
                yield from self._seen_by_some(whole, around)
                continue
            for edge, counts in enumerate(zip(begins, ends, strict=True)):
                queries = slice(edge * EDGE_QUERIES, edge * EDGE_QUERIES + EDGE_QUERIES)
                span = Span(streams, queries, first[:, edge, None], last[:, edge, None], *counts)
                rest = yield from self._seen_by_all(span, around)
                yield from self._seen_by_some(span, rest)

    def _seen_by_all(self, span: Span, rest: Rest) -> Generator[Part, None, Rest]:
        """Yields the parts that every query of the span sees, without a mask; returns the rest."""
        stored, begin = self.stored, rest.begin
        if span.begun > begin + SMALL_PART_KEYS:
            begin = span.begun
            yield Part(span.streams, span.queries, slice(rest.begin, begin), None)
        if rest.others.shape[1] == 0:
            return Rest(begin, rest.others)
        others = span.streams, slice(stored.lasting, None)
        seen = (
            rest.others
            & (stored.position[others] <= span.first)
            & (span.last < stored.until[others])
        )
        for some, slot, filled in packed(seen, span.streams.start):
            mask = (
                None
                if filled is None
                else torch.where(filled, 0.0, HIDDEN).to(self.dtype)[:, None, None]
            )
            yield Part(some, span.queries, stored.tokens(some, slot + stored.lasting, filled), mask)
        return Rest(begin, rest.others & ~seen)

    def _seen_by_some(self, span: Span, rest: Rest) -> Iterator[Part]:
        """Yields the parts that some queries of the span see, with a mask."""
        stored, streams, asked = self.stored, span.streams, self.asked[:, span.queries, None]
        if span.ended > rest.begin:
            slots = slice(rest.begin, span.ended)
            mask = asked[streams] - self.since(stored.position[streams, slots], streams)[:, None]
            yield Part(streams, span.queries, slots, mask.clamp_(max=0)[:, None])
        if rest.others.shape[1] == 0:
            return
        others = streams, slice(stored.lasting, None)
        seen = (
            rest.others
            & (stored.position[others] <= span.last)
            & (span.first < stored.until[others])
        )
        for some, slot, filled in packed(seen, streams.start):
            slot += stored.lasting
            begins, ends = (x[some].gather(1, slot) for x in (stored.position, stored.until))
            if filled is not None:
                begins = begins.masked_fill(~filled, NEVER)
            mask = asked[some] - self.since(begins, some)[:, None]
            torch.minimum(mask, self.since(ends - 1, some)[:, None] - asked[some], out=mask)
            yield Part(
                some, span.queries, stored.tokens(some, slot, filled), mask.clamp_(max=0)[:, None]
            )


def runs(counts: list[int]) -> Iterator[tuple[slice, int]]:
    """Runs of streams with about as many keys, each with the largest count of the run.

    A run ends where a stream would be padded by more than 5 % and 64 keys.
    """
    begin = 0
    while begin < len(counts):
        end, least, most = begin + 1, counts[begin], counts[begin]
        while end < len(counts) and max(most, counts[end]) * 0.95 - 64 <= min(least, counts[end]):
            least, most = min(least, counts[end]), max(most, counts[end])
            end += 1
        yield slice(begin, end), most
        begin = end


def packed(alive: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Lists of the slots that are alive, for runs of streams that have about as many.

    Args:
        alive: bool `[R, S]`.
        first: the number of the first stream.

    Yields:
        The streams of a run, numbered from `first` on; their slots, int64 `[R, n]`; and which of
        these are no padding, bool `[R, n]`, or None if none is.
    """
    counts = alive.sum(1)
    for streams, size in runs(counts.tolist()):
        if size == 0:
            continue
        some = slice(first + streams.start, first + streams.stop)
        slot, own = marked(alive[streams])
        if slot.numel() == size * (streams.stop - streams.start):
            yield some, slot.view(-1, size), None
        else:
            filled = torch.arange(size, device=alive.device) < own[:, None]
            padded = torch.zeros_like(filled, dtype=torch.int64).masked_scatter_(filled, slot)
            yield some, padded, filled
