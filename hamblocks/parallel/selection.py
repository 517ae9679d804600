"""Lifetimes of the tokens of all ranks, by a selector that sees one chunk after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, lower
from hamblocks.parallel.channel import Channel
from hamblocks.parallel.shard import Chunk, ContextShard
from hamblocks.pieces import Pieces
from hamblocks.protocols import Lifetimes, Selection
from hamblocks.state import leaves, tree_map

Select = Callable[[Tensor, Any, Tensor, Tensor | None], Selection]
"""A selector: score, ledger, position and cu_seqlens -> selection."""
Start = Callable[[int, int], Any]
"""The empty ledger for some sequences and heads; None for a selector that has none."""


@torch.no_grad()
def select(
    channel: Channel,
    shard: ContextShard,
    scores: list[Tensor],
    positions: list[Tensor],
    borders: list[Tensor | None],
    selector: Select,
    start: Start,
) -> list[Tensor]:
    """Lifetimes of the tokens of every chunk of this rank.

    A selector without a ledger decides about every chunk separately, and nothing is exchanged. A
    ledger is sent from chunk to chunk in order. Once per chunk, the lifetimes that it lowered are
    sent back: as many as the ledger has slots.

    Args:
        channel: the channel of the call.
        shard: which tokens this rank holds.
        scores: `[B, T, H]` of every chunk of this rank.
        positions: int32 `[B, T]`, positions within the sequences.
        borders: int32 `[N+1]`, borders of the sequences in every chunk; None if it is not packed.
        selector: the selector.
        start: makes its ledger.

    Returns:
        int32 `[B, T, H]` for every chunk of this rank.
    """
    rows, _, heads = scores[0].shape
    if start(1, heads) is None:
        return [
            selector(score, None, position, cu_seqlens).evict_at
            if score.shape[1]
            else torch.zeros_like(score, dtype=torch.int32)
            for score, position, cu_seqlens in zip(scores, positions, borders, strict=True)
        ]
    evict_at: dict[int, Tensor] = {}
    lowered: dict[int, Lifetimes] = {}
    passed: dict[int, Any] = {}  # ledgers on their way between two chunks of this rank
    chunks = zip(shard.own, scores, positions, borders, strict=True)
    for chunk, score, position, cu_seqlens in chunks:
        ledger = None
        if chunk.continues:
            before = shard.owner(chunk.number - 1)
            if before == shard.rank:
                ledger = passed.pop(chunk.number)
            else:
                values = iter(channel.receive(before))
                ledger = tree_map(lambda _: next(values), start(rows, heads))  # noqa: B023
        after = ledger
        if chunk.tokens:
            selection, after = _one_chunk(score, position, cu_seqlens, ledger, selector, start)
            evict_at[chunk.number] = selection.evict_at
            if ledger is not None and selection.lowered is not None:
                lowered[chunk.number] = selection.lowered
        else:
            evict_at[chunk.number] = torch.zeros_like(score, dtype=torch.int32)
        if chunk.goes_on:
            following = shard.owner(chunk.number + 1)
            if following == shard.rank:
                passed[chunk.number + 1] = after
            else:
                channel.send(list(leaves(after)), following)
    changes = _every(channel, shard, lowered, scores[0])
    for chunk, position in zip(shard.own, positions, strict=True):
        _lower(chunk, shard, position, evict_at, changes)
    return [evict_at[chunk.number] for chunk in shard.own]


def _one_chunk(
    score: Tensor,
    position: Tensor,
    cu_seqlens: Tensor | None,
    ledger: Any,
    selector: Select,
    start: Start,
) -> tuple[Selection, Any]:
    """Selection of a chunk, with packed lifetimes, and the ledger for the next chunk.

    Lowered lifetimes are those of sequences that began in an earlier chunk.
    """
    sequences = score.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    own = start(sequences, score.shape[2])
    if ledger is not None:  # of all rows, or of the first packed sequence

        def first(empty: Tensor, came: Tensor) -> Tensor:
            return torch.cat([came, empty[came.shape[0] :].to(came.dtype)])

        own = tree_map(first, own, ledger)
    pieces = Pieces(cu_seqlens, sequences, score.shape[1])
    padded = pieces.apart(score, 0), own, pieces.apart(position, EMPTY), None
    selection = selector(*padded)
    rows = score.shape[0]
    low = selection.lowered
    if low is not None:
        low = Lifetimes(low.position[:rows], low.evict_at[:rows])
    # changed below, where later chunks lower lifetimes
    evict_at = pieces.together(selection.evict_at).clone()
    together = Selection(evict_at, low, None)
    return together, tree_map(lambda x: x[sequences - rows :], selection.ledger)


def _every(
    channel: Channel, shard: ContextShard, lowered: dict[int, Lifetimes], like: Tensor
) -> dict[int, Lifetimes]:
    """What every chunk of every rank lowered."""
    sizes = [lowered[c.number].position.shape[1] if c.number in lowered else 0 for c in shard.own]
    (most,) = channel.largest(max(sizes))
    rows, _, heads = like.shape
    table = torch.full(
        (len(shard.own), 2, rows, most, heads), EMPTY, dtype=torch.int32, device=like.device
    )
    for slot, chunk in enumerate(shard.own):
        if sizes[slot]:
            # empty slots come first
            table[slot, :, :, most - sizes[slot] :] = torch.stack(lowered[chunk.number])
    every = channel.gather(table)
    return {
        chunk.number: Lifetimes(*every[shard.owner(chunk.number)][shard.slot(chunk.number)])
        for chunk in shard.chunks
    }


def _lower(
    chunk: Chunk,
    shard: ContextShard,
    position: Tensor,
    evict_at: dict[int, Tensor],
    changes: dict[int, Lifetimes],
) -> None:
    """Applies lifetimes that later chunks lowered to the tokens of a chunk's last sequence."""
    later = chunk
    while later.goes_on:
        later = shard.chunks[later.number + 1]
        tail = slice(chunk.last - chunk.begin, None)
        mine = evict_at[chunk.number]
        where = position[:, tail, None].expand(-1, -1, mine.shape[2])
        mine[:, tail] = lower(where, mine[:, tail], changes[later.number])
        if later.last != later.begin:  # the sequence ends within that chunk
            break
