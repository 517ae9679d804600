"""Attention with a null sink: one more key, whose value is 0, lets a query read nothing.

With the logit n of the null key, the read of a query is

    out = sum_j exp(l_j) v_j / (exp(n) + sum_j exp(l_j)) = sigmoid(lse - n) * softmax(l) v

The right side leaves the keys as they are, so it works with every implementation and with keys in
pages. But the ops pass no gradient through lse. Where gradients are enabled, the null key is
therefore added to the keys: k = 0, v = 0, and n as its logit bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.keys import DenseKeys, Keys
from hamblocks.ledger import EMPTY
from hamblocks_ops import NEVER
from hamblocks_ops.packing import sequence_of
from hamblocks_ops.precision import wide


def attend_with_null(q: Tensor, keys: Keys, null: Tensor, *, impl: str = "auto") -> Tensor:
    """Softmax attention over the keys that each query sees, and a null key that all queries see.

    Args:
        q: `[B, T, H, D]`.
        keys: the keys.
        null: `[Hkv]`, logit of the null key.
        impl: as in `Keys.attend`.

    Returns:
        The read `[B, T, H, D]`, dtype of q; 0 where a query sees no key.
    """
    if not torch.is_grad_enabled():
        out, lse = keys.attend(q, impl=impl)
        logit = null.to(lse.dtype).repeat_interleave(q.shape[2] // len(null))
        return out * (lse - logit).sigmoid()[..., None].to(out.dtype)
    dense = keys.dense()
    if dense.cu_seqlens is None:
        return _with_null_key(dense, null).attend(q, impl=impl).out
    # in a packed batch queries and keys are the same tokens, so every null key also needs a query;
    # it sees no key, and its output is dropped
    index = torch.arange(q.shape[1], device=q.device)
    place = index + sequence_of(dense.cu_seqlens, q.shape[1]) + 1
    wider, q = _with_null_tokens(dense, null, q, place)
    return wider.attend(q, impl=impl).out[:, place]


def _with_null_tokens(
    keys: DenseKeys, null: Tensor, q: Tensor, place: Tensor
) -> tuple[DenseKeys, Tensor]:
    """Keys and queries of a packed batch with a null token in front of every sequence.

    Args:
        keys: the keys, L = T.
        null: `[Hkv]`.
        q: `[1, T, H, D]`.
        place: int64 `[T]`, index of each token among the T + N tokens.

    Returns:
        Keys of T + N tokens, and q `[1, T + N, H, D]`.
    """
    assert keys.cu_seqlens is not None
    sequences = len(keys.cu_seqlens) - 1
    tokens = q.shape[1] + sequences

    def spread(x: Tensor, fill: float) -> Tensor:
        """x `[1, T, ...]` with `fill` at the null tokens, `[1, T + N, ...]`."""
        return x.new_full((1, tokens, *x.shape[2:]), fill).index_copy(1, place, x)

    heads = keys.k.shape[2]
    bias = _bias(keys, wide(q))
    wider = null.to(bias.dtype).expand(1, tokens, heads)
    cu_seqlens = keys.cu_seqlens + torch.arange(
        sequences + 1, dtype=keys.cu_seqlens.dtype, device=q.device
    )
    with_null = DenseKeys(
        spread(keys.k, 0),
        spread(keys.v, 0),
        position=spread(keys.position, 0),
        evict_at=spread(keys.evict_at, NEVER),
        query_position=spread(keys.query_position, EMPTY),
        logit_bias=wider.index_copy(1, place, bias.expand(-1, -1, heads)),
        cu_seqlens=cu_seqlens,
    )
    return with_null, spread(q, 0)


def _with_null_key(keys: DenseKeys, null: Tensor) -> DenseKeys:
    """The keys of a padded batch, followed by the null key."""
    batch, _, heads, _ = keys.k.shape

    def behind(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, x.new_full((batch, 1, *x.shape[2:]), value)], 1)

    bias = _bias(keys, wide(keys.k)).expand(-1, -1, heads)
    return DenseKeys(
        behind(keys.k, 0),
        behind(keys.v, 0),
        position=behind(keys.position, 0),
        evict_at=behind(keys.evict_at, NEVER),
        query_position=keys.query_position,
        logit_bias=torch.cat([bias, null.to(bias.dtype).expand(batch, 1, heads)], 1),
    )


def _bias(keys: DenseKeys, dtype: torch.dtype) -> Tensor:
    """The logit bias of the keys, `[B, L, heads]`: 0 where they have none."""
    if keys.logit_bias is not None:
        return keys.logit_bias
    return keys.k.new_zeros(*keys.k.shape[:2], 1, dtype=dtype)
