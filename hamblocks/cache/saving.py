"""The tokens of a cache as flat tensors, for a file or another device, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks.cache.pool import Pool, Tokens
from hamblocks.cache.streams import Streams, Unallocated, lasting, ranked
from hamblocks_ops import NEVER


def saved(own: Streams | Unallocated) -> dict[str, Any]:
    """The stored tokens as flat tensors, and sizes as numbers. The caller holds the lock."""
    if isinstance(own, Unallocated):
        return {
            "batch_size": own.sequences,
            "page_size": own.page_size,
            "max_pages": own.max_pages,
        }
    alive = own.alive(own.lifetimes())
    count = alive.sum(1)
    # living tokens first, in order of position; holes last
    order = own.position().where(alive, NEVER).argsort(dim=1, stable=True)
    stream, place = ranked(count, order)
    tokens = own.pool.gather(own.slots(stream, place))
    return {
        **{name: x for name, x in tokens._asdict().items() if x is not None},
        "lengths": count.view(own.sequences, own.heads),
        "seen": own.seen.clone(),
        "page_size": own.pool.page_size,
        "max_pages": own.pool.max_pages,
    }


@lasting
def loaded(state: dict[str, Any], device: torch.device | str | None) -> Streams:
    """The streams of a saved cache that had tokens, in a pool of their own.

    Raises:
        ValueError: the tokens need more than `max_pages` pages.
    """
    state = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in state.items()}
    k, lengths, bias = state["k"], state["lengths"], state.get("logit_bias")
    pool = Pool(
        state["page_size"],
        k.shape[1],
        k.shape[2],
        k,
        logit_bias=bias is not None,
        max_pages=state["max_pages"],
    )
    counts = lengths.flatten()
    pages = -(-counts // pool.page_size)
    total, most = (int(pages.sum()), int(pages.max())) if len(pages) else (0, 0)
    pool.ensure(total)
    table = torch.full((len(pages), most), -1, dtype=torch.int32, device=k.device)
    # the pool is new, so its pages 0, 1, ... are free: streams take them in order
    taken = torch.arange(most, device=k.device) < pages[:, None]
    table[taken] = torch.arange(total, dtype=torch.int32, device=k.device)
    pool.count_users(table, 1)
    streams = Streams(pool, table, state["seen"].clone(), lengths.shape[1])
    # saved tokens have no holes between them: they fill the first slots of their stream
    slots = torch.arange(most * pool.page_size, device=k.device).expand(len(pages), -1)
    stream, place = ranked(counts, slots)
    tokens = Tokens(k, state["v"], state["position"], state["evict_at"], bias)
    pool.scatter(streams.slots(stream, place), tokens, wait=True)
    return streams
