"""Context parallel: a call of a layer on the tokens that one rank holds.

A rank holds chunks of consecutive tokens (`shard`). It computes everything for its own tokens, and
exchanges

- the last inputs of short convolutions before each chunk (`borders`),
- the linear map that each chunk applies to the state of the memory (`recurrence`),
- ledgers, for selectors that have one (`selection`),
- keys and values that are stored when a later chunk begins (`stored`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.calls import CallsParts, Projected
from hamblocks.outputs import LayerOutput, LayerStats
from hamblocks.parallel.borders import borders
from hamblocks.parallel.channel import Channel
from hamblocks.parallel.recurrence import states_before
from hamblocks.parallel.selection import select
from hamblocks.parallel.shard import Chunk, ContextShard
from hamblocks.parallel.stored import Tokens, exchange
from hamblocks.protocols import MemoryTrace, QueryGateOutput
from hamblocks.selectors import start
from hamblocks.slices import HasBorder, HasTransition, Transition
from hamblocks.zero_gradients import with_zero_gradients
from hamblocks_ops.arguments import check_tensor, wrong
from hamblocks_ops.precision import wide


class _Piece(NamedTuple):
    """The tokens of one chunk of this rank.

    Attributes:
        chunk: the chunk.
        x: `[B, T, hidden_size]`.
        projected: q, k and v, or Nones where the layer projects nothing.
        position: int32 `[B, T]`, within the sequences.
        cu_seqlens: int32 `[N+1]`, borders of sequences in the chunk, or None.
        given: `[B, T, heads]`, given scores, or None.
    """

    chunk: Chunk
    x: Tensor
    projected: Projected | tuple[None, None, None]
    position: Tensor
    cu_seqlens: Tensor | None
    given: Tensor | None

    def last_sequence(self, tensor: Tensor | None) -> Tensor | None:
        """The tokens of the last sequence in the chunk."""
        return None if tensor is None else tensor[:, self.chunk.last - self.chunk.begin :]

    def states(self, first: Tensor) -> Tensor:
        """States of all sequences in the chunk, of which only the first one may have begun before.

        Args:
            first: `[B, ...]`, the state before the chunk.
        """
        if self.cu_seqlens is None:
            return first
        others = first.new_zeros(len(self.cu_seqlens) - 2, *first.shape[1:])
        return torch.cat([first, others])


class _Decided(NamedTuple):
    """What gates say of the tokens of one chunk."""

    score: Tensor
    logit_bias: Tensor | None
    decision: QueryGateOutput | None


def call_sharded(
    layer: CallsParts, x: Tensor, shard: ContextShard, given_score: Tensor | None
) -> LayerOutput:
    """`HAMLayer.forward` on the tokens of one rank; every rank of the group must call it.

    Args:
        layer: the layer, with the same parameters on all ranks.
        x: `[B, shard.local_tokens, hidden_size]`.
        shard: which tokens those are.
        given_score: as in `HAMLayer.forward`, of those tokens.

    Raises:
        ValueError: a part has a state that it cannot pass on.
    """
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    channel = Channel(shard.group, x, *trained[:1])
    pieces = _pieces(layer, x, shard, given_score)
    memory_reads, traces = _remembered(layer, channel, shard, pieces)
    stats, reads = None, None
    if layer.attention is not None:
        stats, reads = _attended(layer, channel, shard, pieces, traces)
    if shard.local_tokens:
        memory_read = None if layer.memory is None else torch.cat(memory_reads, 1)
        y = layer._combined(x, memory_read, None if reads is None else torch.cat(reads, 1))
    else:
        y = with_zero_gradients(x, trained)
    y = y + channel.ticket.to(y.dtype)
    shard.sent_nbytes += channel.nbytes
    if stats is None:
        stats = LayerStats(None, None, _where(shard, pieces)[0], None)
    return LayerOutput(y, None, stats)


def check_sharded(x: Tensor, shard: ContextShard, state: object, cu_seqlens: Tensor | None) -> None:
    """Checks that x holds the tokens of a shard, and that nothing is given that the shard replaces.

    Raises:
        ValueError: one of the two is not so.
    """
    sizes = [1 if shard.packed else None, shard.local_tokens, None]
    check_tensor("x", x, "[B, tokens of this rank, hidden]", sizes)
    if state is not None:
        raise wrong("state", "None beside a shard, which holds whole sequences", state)
    if cu_seqlens is not None:
        expected = "None beside a shard, which has the borders of packed sequences"
        raise wrong("cu_seqlens", expected, cu_seqlens)


def _pieces(
    layer: CallsParts, x: Tensor, shard: ContextShard, given_score: Tensor | None
) -> list[_Piece]:
    projected = layer._projected(x)
    pieces = []
    for chunk in shard.own:
        of = slice(None), chunk.slots
        position = shard.position(chunk, x.device).expand(x.shape[0], -1)
        pieces.append(
            _Piece(
                chunk,
                x[of],
                (None,) * 3 if projected is None else Projected(*(one[of] for one in projected)),
                position,
                shard.cu_seqlens(chunk, x.device),
                None if given_score is None else given_score[of],
            )
        )
    return pieces


def _remembered(
    layer: CallsParts, channel: Channel, shard: ContextShard, pieces: list[_Piece]
) -> tuple[list[Tensor], list[MemoryTrace | None]]:
    """Reads of the memory and traces of every chunk; None for a chunk without tokens."""
    memory: Any = layer.memory
    pasts: list[Any] = [None] * len(pieces)
    if memory is not None:
        if not isinstance(memory, HasTransition):
            expected = "one that passes its state on (hamblocks.slices.HasTransition)"
            raise wrong("memory", f"{expected} beside a shard", memory)
        shared = [(None,) * 3 if layer._memory_projects else p.projected for p in pieces]
        inputs = [
            memory.border_inputs(piece.x, *qkv) for piece, qkv in zip(pieces, shared, strict=True)
        ]
        before = borders(channel, shard, inputs, memory.border_size)
        transitions = [
            _transition(memory, piece, qkv, border)
            for piece, qkv, border in zip(pieces, shared, before, strict=True)
        ]
        states = states_before(channel, shard, transitions)
        pasts = [
            memory.state_of(piece.states(border), piece.states(state))
            for piece, border, state in zip(pieces, before, states, strict=True)
        ]
    reads: list[Tensor] = []
    traces: list[MemoryTrace | None] = []
    for piece, past in zip(pieces, pasts, strict=True):
        if not piece.chunk.tokens:
            traces.append(None)
            continue
        projected = piece.projected if isinstance(piece.projected, Projected) else None
        read, trace, _ = layer._remembered(
            piece.x, projected, piece.position, past, piece.cu_seqlens
        )
        if read is not None:
            reads.append(read)
        traces.append(trace if piece.given is None else trace._replace(given=piece.given))
    return reads, traces


def _transition(memory: HasTransition, piece: _Piece, qkv: Any, border: Tensor) -> Transition:
    """What a chunk's last sequence does to the state; the identity in a chunk without tokens."""
    heads, keys, values = memory.recurrent_size
    rows, chunk = piece.x.shape[0], piece.chunk
    if chunk.tokens and chunk.goes_on:
        inputs = [piece.last_sequence(tensor) for tensor in (piece.x, *qkv)]
        assert inputs[0] is not None
        border = border if chunk.last == chunk.begin else torch.zeros_like(border)
        return memory.transition(inputs[0], *inputs[1:], border=border)
    dtype, device = wide(piece.x), piece.x.device
    carry = torch.eye(keys, dtype=dtype, device=device).expand(rows, heads, keys, keys)
    write = torch.zeros(rows, heads, keys, values, dtype=dtype, device=device)
    return Transition(carry, write)


def _attended(
    layer: CallsParts,
    channel: Channel,
    shard: ContextShard,
    pieces: list[_Piece],
    traces: list[MemoryTrace | None],
) -> tuple[LayerStats, list[Tensor]]:
    """Decisions, and the read of attention of every chunk that has tokens."""
    prepared = _prepared(layer, channel, shard, pieces)
    known = [
        None if trace is None else _decided(layer, piece, trace._replace(stored_k=k, stored_v=v))
        for piece, trace, (_, k, v) in zip(pieces, traces, prepared, strict=True)
    ]
    decided = _filled(channel, shard, pieces, known)
    evict_at = select(
        channel,
        shard,
        [one.score for one in decided],
        [piece.position for piece in pieces],
        [piece.cu_seqlens for piece in pieces],
        layer._selected,
        lambda sequences, heads: (
            None
            if layer.selector is None
            else start(layer.selector, sequences, heads, pieces[0].x.device)
        ),
    )
    tokens = []
    for piece, one, (_, k, v), until in zip(pieces, decided, prepared, evict_at, strict=True):
        place, placed = shard.place(piece.chunk, until)
        tokens.append(Tokens(k, v, one.logit_bias, place, placed))
    keys = exchange(channel, shard, tokens)
    reads = [
        layer._attended(q, own, one.decision)
        for piece, (q, _, _), own, one in zip(pieces, prepared, keys, decided, strict=True)
        if piece.chunk.tokens
    ]
    asked = [one.decision.reads for one in decided if one.decision is not None]
    position, last = _where(shard, pieces)
    stats = LayerStats(
        score=torch.cat([one.score for one in decided], 1),
        evict_at=torch.cat(evict_at, 1),
        position=position,
        cu_seqlens=None,
        reads=torch.cat(asked, 1) if asked else None,
        last=last,
    )
    return stats, reads


def _where(shard: ContextShard, pieces: list[_Piece]) -> tuple[Tensor, Tensor]:
    """Positions of this rank's tokens, and of the last tokens of their sequences."""
    position = torch.cat([piece.position for piece in pieces], 1)
    last = torch.cat([shard.last_position(piece.chunk, position.device) for piece in pieces], 1)
    return position, last.expand(position.shape)


def _decided(layer: CallsParts, piece: _Piece, trace: MemoryTrace) -> _Decided:
    score, logit_bias = layer._scored(piece.x, trace)
    decision = None if layer.query_gate is None else layer._asked(piece.x, trace)
    return _Decided(score, logit_bias, decision)


def _filled(
    channel: Channel,
    shard: ContextShard,
    pieces: list[_Piece],
    decided: list[_Decided | None],
) -> list[_Decided]:
    """Decisions about no token for chunks without tokens, with as many heads as the others have."""
    if all(chunk.tokens for chunk in shard.chunks):
        return [one for one in decided if one is not None]
    known = next((one for one in decided if one is not None), None)
    bias = None if known is None else known.logit_bias
    heads = 0 if known is None else known.score.shape[2]
    heads, biases = channel.largest(heads, 0 if bias is None else bias.shape[2])

    def no_token(x: Tensor) -> _Decided:
        none = x.new_zeros(x.shape[0], 0, heads, dtype=wide(x))
        bias = x.new_zeros(x.shape[0], 0, biases, dtype=wide(x)) if biases else None
        return _Decided(none, bias, None)

    return [
        no_token(piece.x) if one is None else one
        for piece, one in zip(pieces, decided, strict=True)
    ]


def _prepared(
    layer: CallsParts, channel: Channel, shard: ContextShard, pieces: list[_Piece]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every chunk, as they are stored."""
    attention: Any = layer.attention
    pasts: list[Tensor | None] = [None] * len(pieces)
    if isinstance(attention, HasBorder) and attention.border_size:
        inputs = [attention.border_inputs(*piece.projected[1:]) for piece in pieces]
        before = borders(channel, shard, inputs, attention.border_size)
        pasts = [piece.states(one) for piece, one in zip(pieces, before, strict=True)]
    result = []
    for piece, past in zip(pieces, pasts, strict=True):
        q, k, v = piece.projected
        assert q is not None
        assert k is not None
        assert v is not None
        if piece.chunk.tokens:
            q, k, v, after = layer._prepared(q, k, v, past, piece.position, piece.cu_seqlens)
            if past is None and after is not None:
                expected = "one that passes its state on (hamblocks.slices.HasBorder)"
                raise wrong("attention", f"{expected} beside a shard", attention)
        result.append((q, k, v))
    return result
