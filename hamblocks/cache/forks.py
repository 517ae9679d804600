"""New handles, and caches mixed from forks, as `HAMState.rollback` needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch.nn.functional import pad

from hamblocks.cache.streams import Streams, Unallocated


@final
class Renewal:
    """A change by which older handles are spent and no token changes."""

    def __init__(self, own: Streams | Unallocated) -> None:
        self.own = own
        own.pending = True

    def apply(self) -> None:
        """Spends the older handles."""
        with self.own.lock:
            self.own.pending = False
            self.own.turn += 1

    def drop(self) -> None:
        """Leaves the older handles valid."""
        with self.own.lock:
            self.own.pending = False


def mixed(streams: Sequence[Streams], choice: Sequence[int]) -> Streams:
    """Streams whose sequence n is that of `streams[choice[n]]`. The caller holds the pool's lock.

    Args:
        streams: of one pool.
        choice: N numbers.
    """
    pool, heads = streams[0].pool, streams[0].heads
    assert all(one.pool is pool for one in streams)
    for one in streams:
        # as in `KVCache.fork`
        one.reservation.release()
        one.private = False
    index = torch.tensor(choice, device=pool.device), torch.arange(len(choice), device=pool.device)
    width = max(one.width for one in streams)
    tables = [pad(one.table, [0, width - one.width], value=-1) for one in streams]
    table = torch.stack(tables).unflatten(1, (len(choice), heads))[index].flatten(0, 1)
    pool.count_users(table, 1)
    seen = torch.stack([one.seen for one in streams])[index]
    return Streams(pool, table, seen, heads, private=False)
