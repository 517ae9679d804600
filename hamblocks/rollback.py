"""Calls of a layer with a state that can go back by its last tokens."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hamblocks.cache.changes import apply_at_once
from hamblocks.ledger import EMPTY
from hamblocks.outputs import LayerOutput, LayerStats
from hamblocks.pieces import Pieces
from hamblocks.selectors import start
from hamblocks.state import HAMState, Ring

if TYPE_CHECKING:
    from hamblocks.layer import HAMLayer


class _Piece(NamedTuple):
    """Some tokens of a call.

    Attributes:
        tokens: their places in the call's dimension T.
        cu_seqlens: int32 `[N+1]`, borders of the sequences among them; None for unpacked batches.
        recorded: whether the state before them is recorded. Then it is one token per sequence, or
            none.
    """

    tokens: slice | Tensor
    cu_seqlens: Tensor | None
    recorded: bool


def call_and_record(
    layer: HAMLayer,
    x: Tensor,
    state: HAMState,
    cu_seqlens: Tensor | None,
    given_score: Tensor | None,
) -> LayerOutput:
    """`HAMLayer.forward` with a state that has a ring.

    The tokens before the last `ring.size` are one call. Each of the last ones is a call of its own,
    and the state before it is recorded. Every call works on a fork, so a recorded state is never
    changed, and an error leaves the given state as it was.

    Args:
        layer: the layer.
        x: `[B, T, hidden_size]` or `[1, sum(T), hidden_size]`, at least one token.
        state: the state; it is spent.
        cu_seqlens: as in `HAMLayer.forward`. The lengths are read, which waits for the device.
        given_score: as in `HAMLayer.forward`.
    """
    ring = state.ring
    assert ring is not None
    pieces = _pieces(x, ring.size, cu_seqlens)
    current = state._replace(ring=None, checkpoints=())
    before, results = [], []
    # The forks are known to this call only. A transaction delays the last step alone, `renewed`.
    with apply_at_once():
        for piece in pieces:
            before.append(current)
            part = None if given_score is None else given_score[:, piece.tokens]
            result = layer.forward(
                x[:, piece.tokens],
                state=current.fork(),
                cu_seqlens=piece.cu_seqlens,
                given_score=part,
            )
            assert result.state is not None
            results.append(result)
            current = result.state
    if state.cache is not None:
        before[0] = before[0]._replace(cache=state.cache.renewed())
    # the checkpoints of a call's pieces are those of the call
    recorded = [
        one._replace(checkpoints=state.checkpoints)
        for one, piece in zip(before, pieces, strict=True)
        if piece.recorded
    ]
    states = (*ring.states, *recorded)
    last = Ring(ring.size, states[max(len(states) - ring.size, 0) :])
    after = current._replace(checkpoints=state.checkpoints, ring=last)
    output = _joined(results, pieces, after, cu_seqlens)
    if len(pieces) == 1:
        return output
    return output._replace(stats=_lifetimes_at_the_end(layer, output.stats, state))


def _pieces(x: Tensor, size: int, cu_seqlens: Tensor | None) -> list[_Piece]:
    if cu_seqlens is None:
        tokens = x.shape[1]
        first = max(tokens - size, 0)
        singles = [_Piece(slice(t, t + 1), None, True) for t in range(first, tokens)]
        return [_Piece(slice(0, first), None, False), *singles] if first else singles
    borders = cu_seqlens.tolist()
    rows = [list(range(a, b)) for a, b in itertools.pairwise(borders)]
    # sequences end together, so those with fewer tokens begin later
    longest = min(max(len(row) for row in rows), size)
    parts = [[row[: max(len(row) - size, 0)] for row in rows]]
    for back in range(longest, 0, -1):
        parts.append([row[len(row) - back :][:1] if len(row) >= back else [] for row in rows])
    pieces = []
    for number, part in enumerate(parts):
        chosen = [token for row in part for token in row]
        if chosen:
            ends = list(itertools.accumulate((len(row) for row in part), initial=0))
            index = torch.tensor(chosen, device=x.device)
            pieces.append(_Piece(index, cu_seqlens.new_tensor(ends), number > 0))
    return pieces


def _joined(
    results: list[LayerOutput],
    pieces: list[_Piece],
    after: HAMState,
    cu_seqlens: Tensor | None,
) -> LayerOutput:
    """The results of the pieces as the result of the call."""
    if len(results) == 1:
        stats = results[0].stats._replace(cu_seqlens=cu_seqlens)
        return LayerOutput(results[0].y, after, stats)
    order = None
    if cu_seqlens is not None:
        order = torch.cat([x.tokens for x in pieces if isinstance(x.tokens, Tensor)]).argsort()

    def join(parts: list[Tensor | None]) -> Tensor | None:
        some = [part for part in parts if part is not None]
        if not some:
            return None
        whole = torch.cat(some, 1)
        return whole if order is None else whole[:, order]

    decided = [x.stats for x in results]
    y, where = join([x.y for x in results]), join([x.position for x in decided])
    assert y is not None
    assert where is not None
    stats = LayerStats(
        score=join([x.score for x in decided]),
        evict_at=join([x.evict_at for x in decided]),
        position=where,
        cu_seqlens=cu_seqlens,
        reads=join([x.reads for x in decided]),
    )
    return LayerOutput(y, after, stats)


def _lifetimes_at_the_end(layer: HAMLayer, stats: LayerStats, before: HAMState) -> LayerStats:
    """The stats with lifetimes that later pieces of the call lowered.

    A selector gives the same lifetimes for one call and for its pieces, so it is asked once more
    for all tokens. In training a controller would count their scores twice; there the lifetimes
    are those at the end of each piece.
    """
    if stats.score is None or layer.selector is None or layer.training:
        return stats
    score = stats.score
    sequences = len(before.position)
    pieces = Pieces(stats.cu_seqlens, sequences, score.shape[1])
    ledger = before.ledger
    if ledger is None:
        ledger = start(layer.selector, sequences, score.shape[2], score.device)
    position, score = pieces.apart(stats.position, EMPTY), pieces.apart(score, 0)
    with torch.no_grad():
        selection = layer._selected(score, ledger, position, None)
    return stats._replace(evict_at=pieces.together(selection.evict_at))
