"""Decoding on a CPU: one new token per sequence, stored in pages that its stream already has.

Most decoding steps take, move and return no page. On a CPU the stored lifetimes can be read without
waiting, so Python code finds a hole for each token, and torch ops only write the tokens.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.cache.streams import Streams, lasting
from hamblocks_ops import Pages
from hamblocks_ops.arguments import values_are_checked


@final
class Append:
    """A change of a cache that writes at most one token per stream into a hole of its own pages.

    It has the same result as a `Commit` of the same tokens (which explains what a hole is).
    """

    def __init__(self, streams: Streams, seen: Tensor, new: Pages, holes: list[int]) -> None:
        """Called by `append` only.

        Args:
            streams: the streams to change.
            seen: int32 `[N]`, tokens seen after the change.
            new: the tokens, one page of one token for each stream.
            holes: the slot of its stream that each token takes; -1: it is not stored.
        """
        self._streams, self._seen, self._new, self._holes = streams, seen, new, holes
        streams.pending = True

    def drop(self) -> None:
        """Leaves the cache as it is."""
        self._streams.pending = False

    @lasting
    def apply(self) -> None:
        """Makes the change."""
        streams = self._streams
        with streams.lock:
            self.drop()
            if max(self._holes) >= 0:
                streams.pool.put(self._slots(), self._new)
            if streams.reservation.steps:
                streams.reservation.steps -= 1
            streams.seen.copy_(self._seen)
            streams.turn += 1

    def _slots(self) -> list[int]:
        """The slots of the pool; -1: not stored."""
        size = self._streams.pool.page_size
        table = self._streams.lease.table
        column = torch.tensor([[max(hole, 0) // size] for hole in self._holes], device=table.device)
        page = table.gather(1, column).tolist()
        return [
            -1 if hole < 0 else first * size + hole % size
            for hole, (first,) in zip(self._holes, page, strict=True)
        ]


def append(streams: Streams, seen: Tensor, new: Pages) -> Append | None:
    """Plans the change; None if it needs a `Commit`. The caller holds the lock of the pool.

    Args:
        streams: the streams to change; no lifetime of a stored token was lowered.
        seen: int32 `[N]`, tokens seen after the change.
        new: the new tokens by stream.
    """
    pool, reservation = streams.pool, streams.reservation
    if new.k.shape[1] != 1 or not streams.private or not values_are_checked(streams.seen):
        return None
    # A commit takes back the pages of dead caches, and ends a reservation that is used up.
    reserved = reservation.steps > 0
    if not reserved and (pool.returned or reservation.pages or reservation.end is not None):
        return None
    size, have = pool.page_size, streams.listing().have
    # with less than a page of holes in a wider table, a commit would narrow it
    if not reserved and streams.width != max(have, default=0):
        return None
    if streams.width == 0:
        return None
    # argmin takes the first of equal numbers
    alive = streams.alive(streams.lifetimes(), seen).byte()
    stored, first_hole = alive.sum(1).tolist(), alive.argmin(1).tolist()
    now = seen.tolist()
    holes = []
    for stream, ([position], [until]) in enumerate(
        zip(new.position.tolist(), new.evict_at.tolist(), strict=True)
    ):
        # as in `Commit`: a token that no later query sees, and padding, is never written
        enters = position < until and until > now[stream // streams.heads]
        pages = -(-(stored[stream] + enters) // size)  # rounded up
        if pages > have[stream] or (pages < have[stream] and not reserved):
            return None
        holes.append(first_hole[stream] if enters else -1)
    return Append(streams, seen, new, holes)
