"""The KV cache of a layer: the stored tokens of every sequence and key/value head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks.protocols import Lifetimes
from hamblocks.selectors import lower
from hamblocks_ops import NEVER, compact


class KVCache(NamedTuple):
    """Stored tokens, per head in order of time, padded to the fullest head. Explicit state: methods return a new one.

    Attributes:
        k: `[N, L, Hkv, D]`, keys as attention reads them (normalised, rotated).
        v: `[N, L, Hkv, D]`.
        position: int32 `[N, L, Hkv]`; NEVER for padding, which no query sees.
        evict_at: int32 `[N, L, Hkv]`.
        logit_bias: `[N, L, Hkv]` float32, or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None

    @property
    def tokens(self) -> Tensor:
        """How many tokens are stored, int64 `[N, Hkv]`."""
        return (self.position != NEVER).sum(1)

    def lower(self, changes: Lifetimes | None) -> KVCache:
        """The cache after a selector lowered lifetimes; what it lists may be decided for the whole layer (H = 1)."""
        if changes is not None and changes.position.shape[2] != self.position.shape[2]:
            changes = Lifetimes(*(x.expand(-1, -1, self.position.shape[2]) for x in changes))
        return self._replace(evict_at=lower(self.position, self.evict_at, changes))

    def append(self, k: Tensor, v: Tensor, position: Tensor, evict_at: Tensor, logit_bias: Tensor | None) -> KVCache:
        """The cache with new tokens behind its own; position int32 `[N, T]`, -1 for padding."""
        where = position[..., None].expand(evict_at.shape)
        where = torch.where(where < 0, NEVER, where)
        bias = None
        if self.logit_bias is not None and logit_bias is not None:
            bias = torch.cat([self.logit_bias, logit_bias], 1)
        pairs = (self.k, k), (self.v, v), (self.position, where), (self.evict_at, evict_at)
        k, v, where, evict_at = (torch.cat(pair, 1) for pair in pairs)
        return KVCache(k, v, where, evict_at, bias)

    def evict(self, now: Tensor) -> KVCache:
        """The cache without the tokens that no query from position now `[N]` on sees."""
        alive = (self.evict_at > now[:, None, None]) & (self.position != NEVER)
        if self.position.shape[1] == 0:
            return self
        kept = compact(torch.where(alive, NEVER, -1), position=torch.zeros_like(self.position[..., 0]))
        index = kept.index.mT.long()
        padding = index == self.position.shape[1]
        index = index.clamp(max=self.position.shape[1] - 1)
        wide = index[..., None].expand(-1, -1, -1, self.k.shape[-1])
        k, v = (x.gather(1, wide).masked_fill(padding[..., None], 0) for x in (self.k, self.v))
        return KVCache(
            k,
            v,
            self.position.gather(1, index).masked_fill(padding, NEVER),
            self.evict_at.gather(1, index).masked_fill(padding, 0),
            None if self.logit_bias is None else self.logit_bias.gather(1, index).masked_fill(padding, 0),
        )

    @staticmethod
    def empty(sequences: int, kv_heads: int, head_dim: int, like: Tensor, logit_bias: bool = False) -> KVCache:
        """A cache without a token, in the dtype and on the device of `like`."""
        keys = like.new_empty(sequences, 0, kv_heads, head_dim)
        position = torch.empty(sequences, 0, kv_heads, dtype=torch.int32, device=like.device)
        bias = like.new_empty(sequences, 0, kv_heads, dtype=torch.float32) if logit_bias else None
        return KVCache(keys, keys, position, position, bias)
