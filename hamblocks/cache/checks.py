"""Checks of the arguments of a cache: against each other, and against what is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.cache.streams import Streams
from hamblocks_ops.arguments import check_integer, check_tensor, wrong
from hamblocks_ops.packing import FEW_POSITIONS


def check_sequences(sequences: Tensor, count: int, like: Tensor | None = None) -> None:
    """Checks a mask of sequences, bool `[N]`, of `count` sequences; `like`: a tensor beside it."""
    check_tensor("sequences", sequences, "[N]", [count], like=like)
    if sequences.dtype != torch.bool:
        raise wrong("sequences", "dtype bool", sequences)


def check_tokens(
    k: Tensor,
    v: Tensor,
    position: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    sequences: int,
) -> None:
    """Checks that the tensors of a call fit each other."""
    check_tensor("k", k, "[N, T, Hkv, D]", [sequences, None, None, None])
    tokens, kv_heads = k.shape[1:3]
    check_tensor("v", v, "[N, T, Hkv, D]", [*k.shape], like=k)
    check_tensor("position", position, "[N, T]", [sequences, tokens], like=k)
    check_integer("position", position)
    for name, value in (("evict_at", evict_at), ("logit_bias", logit_bias)):
        if value is not None:
            shared = isinstance(value, Tensor) and value.dim() == 3 and value.shape[2] == 1
            sizes = [sequences, tokens, 1 if shared else kv_heads]
            check_tensor(name, value, "[N, T, Hkv] or [N, T, 1]", sizes, like=k)
    check_integer("evict_at", evict_at)


def check_keys(streams: Streams, k: Tensor, v: Tensor) -> None:
    """Checks that keys and values fit the stored ones."""
    pool = streams.pool
    sizes = [streams.sequences, None, streams.heads * pool.heads, pool.head_dim]
    check_tensor("k", k, "[N, T, Hkv, D]", sizes)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, "[N, T, Hkv, D]", [*k.shape])
        if value.dtype != pool.dtype or value.device != pool.device:
            dtype = str(pool.dtype).removeprefix("torch.")
            raise wrong(name, f"{dtype} on {pool.device}, as the cache", value)


def check_decisions(streams: Streams, evict_at: Tensor, logit_bias: Tensor | None) -> None:
    """Checks that lifetimes and biases have as many heads as the cache has streams, or one."""
    has_bias = streams.pool.bias is not None
    for name, value in (("evict_at", evict_at), ("logit_bias", logit_bias)):
        if value is not None and value.shape[2] != 1 and value.shape[2] != streams.heads:
            raise wrong(name, "1 head, as the cache", f"{value.shape[2]} heads")
    if (logit_bias is not None) != has_bias:
        expected = "a bias, as the cache has" if has_bias else "None, as the cache"
        raise wrong("logit_bias", expected, logit_bias)


def check_order(position: Tensor, seen: Tensor) -> None:
    """Checks that no new token has the position of a token that was seen already."""
    if position.numel() <= FEW_POSITIONS:  # decoding: reading them costs no op
        pairs = zip(position.tolist(), seen.tolist(), strict=True)
        if not any(0 <= at < begin for own, begin in pairs for at in own):
            return
    early = (position >= 0) & (position < seen[:, None])
    if bool(early.any()):
        n, t = (int(i) for i in early.nonzero()[0])
        expected = f"none before the {int(seen[n])} tokens that sequence {n} has seen"
        raise wrong("position", expected, f"{int(position[n, t])}")
