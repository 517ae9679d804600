"""Queries, keys and values of a call as SDPA takes them: one row for each stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.packing import NEVER
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.gather.plan import (
    BLOCK_QUERIES,
    Batch,
    Part,
    QueryBlock,
    Stored,
    Tokens,
)


def widened(call: Batch, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v in float32 or float64, and the scale of their logits.

    A bias becomes one more column of k, beside a column of ones in q, so that SDPA computes its
    gradient too. The scale then is multiplied into q: otherwise the bias would have to be divided
    by it.
    """
    dtype = wide(call.q)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if call.logit_bias is None:
        return q, k, v, scale
    q = torch.cat([scale * q, torch.ones_like(q[..., :1])], -1)
    k = torch.cat([k, call.logit_bias.to(dtype)[..., None]], -1)
    return q, k, pad(v, [0, 1]), 1.0


class Operands:
    """q, k, v with one row for each stream, and which keys are stored.

    Attributes:
        stored: the lists of stored keys.
        time: int32 `[R, Tq]`, the times of the queries.
        scale: factor of the logits of `q` and of the keys.
        rescale: factor of the gradient of `q`, which may carry the scale.
        width: D, or D + 1 with a bias.
        lasting: k and v of the keys stored for good, gathered once, `[R, 1, P, width]`.
    """

    def __init__(self, call: Batch, scale: float) -> None:
        self.kv_heads, self.dim = call.k.shape[2:]
        self.group = call.q.shape[2] // self.kv_heads
        self.stored = Stored(call)
        self.order = self.stored.order
        self.time = call.query_position.repeat_interleave(self.kv_heads, 0)
        if self.order is not None:
            self.time = self.time[self.order]
        self.q, k, v, self.scale = widened(call, scale)
        self.rescale = 1.0 if call.logit_bias is None else scale
        self.width = self.q.shape[-1]
        self.flat = [x.reshape(-1, self.width) for x in (k, v)]
        everything = slice(None), slice(self.stored.lasting)
        self.lasting_tokens = Tokens(
            self.stored.token[everything], self.stored.position[everything] < NEVER
        )
        self.lasting = self._keys(self.lasting_tokens)

    def blocks(self) -> Iterator[tuple[slice, Iterator[Part]]]:
        """Blocks of queries, each with the parts that it reads."""
        for start in range(0, self.time.shape[1], BLOCK_QUERIES):
            block = slice(start, start + BLOCK_QUERIES)
            yield block, QueryBlock(self.stored, self.time[:, block], self.q.dtype).parts()

    def _keys(self, tokens: Tokens) -> list[Tensor]:
        """k and v of some keys, `[R, 1, n, width]` each.

        Padding is zero, because a key that is not stored may hold NaN.
        """
        shape = *tokens.flat.shape, self.width
        keys = [x.index_select(0, tokens.flat.flatten()).view(shape) for x in self.flat]
        if tokens.filled is not None:
            hole = (~tokens.filled).nonzero(as_tuple=True)
            keys = [x.index_put_(hole, x.new_zeros(())) for x in keys]
        return [x[:, None] for x in keys]

    def by_stream(self, x: Tensor) -> Tensor:
        """Queries `[B, i, H, ...]` by stream: `[B * Hkv, G, i, ...]`."""
        x = x.unflatten(2, (self.kv_heads, self.group)).movedim(1, 3).flatten(0, 1)
        return x if self.order is None else x[self.order]

    def by_token(self, x: Tensor) -> Tensor:
        """The inverse of `by_stream`: `[B * Hkv, G, i, ...]` -> `[B, i, H, ...]`."""
        x = x if self.order is None else x[self.order.argsort()]
        y: Tensor = x.unflatten(0, (-1, self.kv_heads)).movedim(3, 1).flatten(2, 3)
        return y

    def gather(self, part: Part) -> tuple[Tensor, Tensor]:
        """k and v of a part, `[R, G, n, width]` each; the heads of a group share memory."""
        if isinstance(part.keys, Tokens):
            k, v = self._keys(part.keys)
        else:
            k, v = (x[part.streams, :, part.keys] for x in self.lasting)
        return k.expand(-1, self.group, -1, -1), v.expand(-1, self.group, -1, -1)
