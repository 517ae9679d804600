"""Exchanges the keys and values that later chunks read: those that are stored.

A token goes to a rank if it is still stored at the beginning of the first later chunk of that rank.
So at a keep fraction f, it sends a fraction f of the bytes that ring attention sends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks.keys import DenseKeys
from hamblocks.parallel.channel import Channel
from hamblocks.parallel.shard import Chunk, ContextShard


class Tokens(NamedTuple):
    """Keys and values of a chunk, placed along the row (see `ContextShard.place`).

    Attributes:
        k: `[B, T, Hkv, D]`.
        v: `[B, T, Hkv, D]`.
        logit_bias: `[B, T, Hkv or 1]`, or None.
        place: int32 `[B, T]`.
        evict_at: int32 `[B, T, Hkv or 1]`.
    """

    k: Tensor
    v: Tensor
    logit_bias: Tensor | None
    place: Tensor
    evict_at: Tensor


class _Received(NamedTuple):
    """Stored tokens of other chunks, one per head that decides, `n` of them.

    Attributes:
        where: int64 `[n, 4]`: batch row, head, place, evict_at.
        values: `[n, 2, heads that share the decision, D]`, keys and values.
        logit_bias: `[n, heads of the bias that share the decision]`, or None.
    """

    where: Tensor
    values: Tensor
    logit_bias: Tensor | None


def exchange(channel: Channel, shard: ContextShard, own: list[Tokens]) -> list[DenseKeys]:
    """The keys that the queries of every chunk of this rank may read.

    Args:
        channel: the channel of the call.
        shard: which tokens this rank holds.
        own: the tokens of every chunk of this rank.

    Returns:
        Keys for every chunk: those that it received, then its own.
    """
    received = _received(channel, shard, own)
    return [_keys(chunk, tokens, received) for chunk, tokens in zip(shard.own, own, strict=True)]


def _received(channel: Channel, shard: ContextShard, own: list[Tokens]) -> _Received:
    heads = own[0].evict_at.shape[2]
    picked: list[tuple[int, Tensor]] = []  # (slot of the chunk, index [n, 3]) for every rank
    sent = []
    for rank in range(shard.ranks):
        count = 0
        for slot, (chunk, tokens) in enumerate(zip(shard.own, own, strict=True)):
            later = _next_of(shard, chunk, rank)
            nothing = tokens.place.new_zeros(0, 3, dtype=torch.int64)
            index = nothing if later is None else (tokens.evict_at > later.begin).nonzero()
            picked.append((slot, index))
            count += len(index)
        sent.append(count)
    arrives = channel.counts(sent)
    where = torch.cat([_where(own[slot], index) for slot, index in picked])
    values = torch.cat([_values(own[slot], index, heads) for slot, index in picked])
    bias = None
    if own[0].logit_bias is not None:
        bias = torch.cat([_bias(own[slot], index, heads) for slot, index in picked])
        bias = channel.exchange(bias, sent, arrives)
    return _Received(
        channel.exchange(where, sent, arrives), channel.exchange(values, sent, arrives), bias
    )


def _next_of(shard: ContextShard, chunk: Chunk, rank: int) -> Chunk | None:
    """The first chunk of a rank after a chunk that has tokens."""
    later = (c for c in shard.chunks[chunk.number + 1 :] if shard.owner(c.number) == rank)
    return next((c for c in later if c.tokens), None)


def _where(tokens: Tokens, index: Tensor) -> Tensor:
    row, token, head = index.unbind(1)
    place, evict_at = tokens.place[row, token], tokens.evict_at[row, token, head]
    return torch.stack([row.int(), head.int(), place, evict_at], 1)


def _values(tokens: Tokens, index: Tensor, heads: int) -> Tensor:
    """Keys and values of the heads that share a decision."""
    of = index.unbind(1)
    return torch.stack([x.unflatten(2, (heads, -1))[of] for x in (tokens.k, tokens.v)], 1)


def _bias(tokens: Tokens, index: Tensor, heads: int) -> Tensor:
    row, token, head = index.unbind(1)
    bias = tokens.logit_bias
    assert bias is not None
    if bias.shape[2] > 1:
        own: Tensor = bias.unflatten(2, (heads, -1))[row, token, head]
        return own
    return bias[row, token]  # one bias, of a token that any head may have stored


def _keys(chunk: Chunk, tokens: Tokens, received: _Received) -> DenseKeys:
    """The received tokens that are stored at the beginning of a chunk, then its own."""
    heads = tokens.evict_at.shape[2]
    row, head, place, evict_at = received.where.long().unbind(1)
    chosen = ((place < chunk.begin) & (evict_at > chunk.begin)).nonzero().squeeze(1)
    # by row and head, then by place
    chosen = chosen[place[chosen].argsort(stable=True)]
    group = row[chosen] * heads + head[chosen]
    order = group.argsort(stable=True)
    chosen, group = chosen[order], group[order]
    groups = tokens.k.shape[0] * heads
    counts = torch.bincount(group, minlength=groups)
    most = int(counts.max()) if len(chosen) else 0
    rank = torch.arange(len(chosen), device=group.device) - (counts.cumsum(0) - counts)[group]
    # unused entries come first, so that places ascend
    slot = most - counts[group] + rank

    def laid_out(x: Tensor) -> Tensor:
        """`[n, ...]` -> `[B, most, heads, ...]`."""
        empty = x.new_zeros(groups, most, *x.shape[1:])
        full: Tensor = torch.index_put(empty, (group, slot), x[chosen])
        full = full.unflatten(0, (groups // heads, heads))
        return full.transpose(1, 2)

    values = laid_out(received.values).transpose(3, 4).flatten(2, 3)  # [B, most, Hkv, 2, D]
    k, v = values.unbind(3)
    bias = None
    if tokens.logit_bias is not None:
        assert received.logit_bias is not None
        bias = laid_out(received.logit_bias).flatten(2)
        own = tokens.logit_bias
        if own.shape[2] == 1 and heads > 1:
            own = own.expand(-1, -1, heads)
        bias = torch.cat([bias, own], 1)
    places = torch.cat(
        [laid_out(place.int()), tokens.place[..., None].expand_as(tokens.evict_at)], 1
    )
    until = torch.cat([laid_out(evict_at.int()), tokens.evict_at], 1)
    if heads == 1:
        places = places[..., 0]
    return DenseKeys(
        torch.cat([k, tokens.k], 1),
        torch.cat([v, tokens.v], 1),
        position=places,
        evict_at=until,
        query_position=tokens.place,
        logit_bias=bias,
    )
