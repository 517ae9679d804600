"""The read of attention where a query gate lets only some queries read.

The queries that read are gathered, attention runs over them alone, and their reads are put back. So
the cost follows the number of queries that read, whatever the implementation of attention, and a
call in which no query reads does not run attention at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hamblocks.keys import DenseKeys, Keys
from hamblocks.ledger import EMPTY
from hamblocks.pieces import Pieces
from hamblocks.protocols import QueryGateOutput
from hamblocks_ops import NEVER

Attend = Callable[[Tensor, Keys], Tensor]
"""An attention part."""


def gated_read(attend: Attend, q: Tensor, keys: Keys, decision: QueryGateOutput) -> Tensor:
    """The read of the queries that read, and the windowed read of the others.

    The host waits for the number of queries that read, and with a window for that of the others.
    Compiled code and calls on the meta device do not gather: there, queries that do not read stay
    in the batch, and see no key.

    Args:
        attend: the attention part.
        q: `[B, T, H, D]`.
        keys: the keys that may be read; packed or not.
        decision: what the query gate decided, `[B, T]`.

    Returns:
        `[B, T, H, D]`; 0 for a query that sees nothing.
    """
    packed = isinstance(keys, DenseKeys) and keys.cu_seqlens is not None
    if packed and not (torch.compiler.is_compiling() or q.is_meta):
        return _unpacked(attend, q, keys.dense(), decision)
    reads, weight, window = decision
    real = keys.query_position != EMPTY
    read = _read_of(attend, q, lambda: keys, reads & real, keys.query_position)
    if weight is not None:
        read = read * weight[..., None].to(read.dtype)
    if window:
        near = _read_of(
            attend, q, lambda: keys.dense().within(window), ~reads & real, keys.query_position
        )
        read = read + near
    return read


def _read_of(
    attend: Attend,
    q: Tensor,
    keys_of: Callable[[], Keys],
    asked: Tensor,
    query_position: Tensor,
) -> Tensor:
    """The read of some queries, and 0 for the others.

    Args:
        attend: the attention part.
        q: `[B, T, H, D]`.
        keys_of: makes the keys; not called if no query reads.
        asked: bool `[B, T]`, the queries that read.
        query_position: int32 `[B, T]`.
    """
    if torch.compiler.is_compiling() or q.is_meta:
        position = query_position.masked_fill(~asked, EMPTY)
        return attend(q, keys_of().for_queries(position)).masked_fill(~asked[..., None, None], 0)
    most = int(asked.sum(1).amax())
    if most == 0:
        return torch.zeros_like(q)
    # the queries that read come first, in their order; the rest of a shorter row is padding
    index = (~asked).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    there = asked.gather(1, index)
    position = query_position.gather(1, index).masked_fill(~there, EMPTY)
    wide = index[..., None, None].expand(-1, -1, *q.shape[2:])
    read = attend(q.gather(1, wide), keys_of().for_queries(position))
    return torch.zeros_like(q).scatter(1, wide, read.masked_fill(~there[..., None, None], 0))


def _unpacked(attend: Attend, q: Tensor, keys: DenseKeys, decision: QueryGateOutput) -> Tensor:
    """`gated_read` of packed sequences, each in a batch row of its own."""
    assert keys.cu_seqlens is not None
    pieces = Pieces(keys.cu_seqlens, len(keys.cu_seqlens) - 1, q.shape[1])
    bias, weight = keys.logit_bias, decision.weight
    apart = DenseKeys(
        pieces.apart(keys.k, 0),
        pieces.apart(keys.v, 0),
        position=pieces.apart(keys.position, NEVER),
        evict_at=pieces.apart(keys.evict_at, 0),
        query_position=pieces.apart(keys.query_position, EMPTY),
        logit_bias=None if bias is None else pieces.apart(bias, 0),
    )
    own = decision._replace(
        reads=pieces.apart(decision.reads, False),
        weight=None if weight is None else pieces.apart(weight, 0),
    )
    return pieces.together(gated_read(attend, pieces.apart(q, 0), apart, own))
