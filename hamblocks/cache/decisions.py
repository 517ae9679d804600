"""Lifetimes that a selector lowered for tokens that a cache already stores."""

from __future__ import annotations

from torch import Tensor

from hamblocks.cache.streams import Streams
from hamblocks.ledger import EMPTY, lower
from hamblocks.protocols import Lifetimes
from hamblocks_ops.append import lower as lower_by_kernel
from hamblocks_ops.append import runs
from hamblocks_ops.arguments import wrong


def lowered_lifetimes(streams: Streams, lowered: Lifetimes) -> Tensor:
    """Lifetimes of every slot after a selector lowered some, int32 `[R, S]`."""
    if lowered.position.shape[2] != 1 and lowered.position.shape[2] != streams.heads:
        got = f"{lowered.position.shape[2]} heads"
        raise wrong("lowered", f"{streams.heads} heads, as the cache", got)
    lowered = Lifetimes(*(x.expand(-1, -1, streams.heads) for x in lowered))
    pool = streams.pool
    if lowered.position.shape[1] and runs(streams.table):
        with streams.lock:
            given = pool.position, pool.evict_at, streams.seen, *lowered, streams.width
            return lower_by_kernel(streams.table, *given)
    until = streams.lifetimes()
    # a hole keeps the position of its last token, which must not match a lowered one
    position = streams.position().where(streams.alive(until), EMPTY)
    changed = lower(streams.by_sequence(position), streams.by_sequence(until), lowered)
    return changed.mT.flatten(0, 1)
