"""Decoding on a GPU: one new token per stream, stored in reserved pages by Triton kernels."""

from __future__ import annotations

from typing import final

from torch import Tensor

from hamblocks.cache.streams import Streams, lasting
from hamblocks_ops import Pages
from hamblocks_ops.append import Paged, append, runs


@final
class Placed:
    """A change of a cache with the same result as a `Commit` of the tokens, in few kernels."""

    def __init__(self, streams: Streams, seen: Tensor, until: Tensor | None, new: Pages) -> None:
        """Called by `placed` only.

        Args:
            streams: the streams to change.
            seen: int32 `[N]`, tokens seen after the change.
            until: int32 `[R, S]`, lifetimes after a selector lowered some; None: unchanged.
            new: the tokens, one page of one token for each stream.
        """
        self._streams, self._seen, self._until, self._new = streams, seen, until, new
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
            pool, new = streams.pool, self._new
            most = streams.reservation.most_pages
            assert most is not None
            paged = Paged(
                table=streams.lease.table,
                users=pool.users,
                position=pool.position,
                evict_at=pool.evict_at,
                bias=pool.bias,
                slabs=pool.keys,
                seen=streams.seen,
                most_pages=most,
                width=streams.width,
            )
            append(
                paged,
                new.k[:, 0].contiguous(),
                new.v[:, 0].contiguous(),
                new.position.flatten(),
                new.evict_at.flatten(),
                None if new.logit_bias is None else new.logit_bias.flatten(),
                self._seen,
                self._until,
            )
            streams.reservation.steps -= 1
            streams.relisted()
            streams.turn += 1


def placed(streams: Streams, seen: Tensor, until: Tensor | None, new: Pages) -> Placed | None:
    """Plans the change; None if it needs a `Commit`. The caller holds the lock of the pool.

    Args:
        streams: the streams to change.
        seen: int32 `[N]`, tokens seen after the change.
        until: int32 `[R, S]`, lifetimes after a selector lowered some; None: unchanged.
        new: the new tokens by stream.
    """
    if new.k.shape[1] != 1 or not streams.private or streams.reservation.steps < 1:
        return None
    if not len(streams.table) or not streams.pool.keys or not runs(streams.lease.table):
        return None
    return Placed(streams, seen, until, new)
