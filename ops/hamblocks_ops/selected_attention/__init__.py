"""Softmax attention over the tokens that a policy stored, at the cost of what it stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_floating,
    check_integer,
    check_range,
    check_scale,
    check_tensor,
    without_heads,
    wrong,
)
from hamblocks_ops.declare import Hints, op_with_choice
from hamblocks_ops.dispatch import Implementation, interpreted
from hamblocks_ops.packing import int32, positions
from hamblocks_ops.selected_attention import block_mask, flash, flex, flex_compact, reference
from hamblocks_ops.selected_attention.call import (
    AttentionCall,
    AttentionOutput,
    rounded,
    without_tiles,
)

__all__ = ["AttentionOutput", "selected_attention"]


def _refused_by_triton(call: AttentionCall) -> str | None:
    return without_tiles(call.q)


def _run_triton(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.triton import run

    return run(call)


def _run_gather(call: AttentionCall) -> tuple[Tensor, Tensor]:
    # imported when used: registering its operators takes longer than importing all other ops
    from hamblocks_ops.selected_attention.gather import run

    return run(call)


def _waits(_call: AttentionCall) -> str:
    return "it waits for the device to tell which keys are stored"


def _is_the_baseline(_call: AttentionCall) -> str:
    return "it is the baseline: it visits keys that are not stored"


def _example(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x, x, x, torch.ones(x.shape[:3], dtype=torch.int32, device=x.device)), {}


@op_with_choice(
    Implementation("triton", _run_triton, _refused_by_triton, passed_over=interpreted, opaque=True),
    Implementation("gather", _run_gather, opaque=True),
    Implementation("flash", flash.run, flash.refused, passed_over=_waits, opaque=True),
    Implementation(
        "flex-compact",
        flex_compact.run,
        block_mask.refused,
        passed_over=flex_compact.passed_over,
        opaque=True,
    ),
    Implementation("flex", flex.run, block_mask.refused, passed_over=_is_the_baseline, opaque=True),
    Implementation("reference", reference.run),
    finish=lambda call, result: rounded(call.q, result),
    hints=Hints(
        differentiable=True,
        attends=True,
        by_token=("q", "k", "v", "evict_at", "logit_bias"),
    ),
    example=_example,
)
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    *,
    scale: float | None = None,
    logit_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    key_lengths: Tensor | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    r"""Attends from every query to the tokens that are stored at its time.

    \[
    o_t = \sum_{j:\; p_j \le t < \text{evict\_at}_j} \operatorname{softmax}_j
          (\text{scale} \cdot q_t^\top k_j + \text{logit\_bias}_j)\, v_j
    \]

    A query that sees nothing reads 0, has lse = -inf and passes no gradient. A query sees its own
    token only if `evict_at` says so.

    Args:
        q: `[B, Tq, H, D]`, any floating dtype.
        k: `[B, Tk, Hkv, D]`, same dtype; H is a multiple of Hkv (query head h reads key head h //
            (H // Hkv)).
        v: `[B, Tk, Hkv, D]`, same dtype.
        evict_at: int32 `[B, Tk, Hkv]` or `[B, Tk, 1]`: the first position that no longer sees token
            j.
        scale: factor of the logits; None: D ** -0.5.
        logit_bias: `[B, Tk, Hkv]` or `[B, Tk, 1]`, floating, added to the logits of key j,
            differentiable; -inf hides the key.
        cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one batch row (B = 1, Tq =
            Tk).
        query_position: int `[B, Tq]`, within the sequence; None: counted from 0.
        key_position: int `[B, Tk]` or `[B, Tk, Hkv]`; None: counted from 0. With both, the keys are
            a cache.
        key_lengths: int `[B]` or `[B, Hkv]`: the number of keys; what stands behind them is
            padding. None: no padding.
        impl: "triton" (a GPU kernel over the stored keys; bfloat16, float16, float32, head sizes up
            to 256), "gather" (SDPA over the stored keys, any device), "reference" (dense mask), or
            "auto", which takes one of these. "flash": FlashAttention for ragged lengths on a GPU,
            where it is exact: decoding, inference, and queries that are the stored tokens. "flex":
            FlexAttention over all keys, the baseline.

    Returns:
        out `[B, Tq, H, D]`, dtype of q, and lse `[B, Tq, H]` (see `AttentionOutput`).

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    batch, keys, kv_heads = k.shape[:3]
    shape = batch, keys, kv_heads
    if key_position is None:
        same = query_position is None and q.shape[1] == keys
        key_position = positions(batch, keys, device=q.device, cu_seqlens=cu_seqlens)
        query_position = key_position if same else query_position
    if query_position is None:
        query_position = positions(batch, q.shape[1], device=q.device, cu_seqlens=cu_seqlens)
    if key_position.dim() == 2:
        key_position = key_position[..., None]
    key_position, evict_at = int32(key_position).expand(shape), int32(evict_at).expand(shape)
    # a lifetime that ends where it begins: the key is never stored, so no implementation reads it
    if key_lengths is not None:
        lengths = key_lengths[:, None] if key_lengths.dim() == 1 else key_lengths
        beyond = torch.arange(keys, device=q.device)[None, :, None] >= lengths[:, None]
        evict_at = torch.where(beyond, key_position, evict_at)
    if logit_bias is not None:
        logit_bias = logit_bias.expand(shape)
        hidden = logit_bias == float("-inf")
        evict_at = torch.where(hidden, key_position, evict_at)
        logit_bias = logit_bias.masked_fill(hidden, 0)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        evict_at=evict_at,
        logit_bias=logit_bias,
        query_position=int32(query_position),
        key_position=key_position,
        cu_seqlens=cu_seqlens,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
    )
    return selected_attention.request(call, impl)


@selected_attention.check
def _check_selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    *,
    scale: float | None = None,
    logit_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    key_lengths: Tensor | None = None,
    impl: str = "auto",
) -> None:
    check_tensor("q", q, "[B, Tq, H, D]", [None] * 4)
    check_floating("q", q)
    if 0 in q.shape[2:]:
        raise without_heads("q", q)
    if scale is not None:
        check_scale(scale)
    batch, queries, heads, dim = q.shape
    check_tensor("k", k, "[B, Tk, Hkv, D]", [batch, None, None, dim], like=q)
    check_floating("k", k, like=q)
    keys, kv_heads = k.shape[1:3]
    check_tensor("v", v, "[B, Tk, Hkv, D]", [batch, keys, kv_heads, dim], like=q)
    check_floating("v", v, like=q)
    if kv_heads == 0 or heads % kv_heads != 0:
        expected = f"a number of heads that divides the {heads} heads of q"
        raise wrong("k", expected, f"{kv_heads} heads")
    shape = [batch, keys, kv_heads]
    _check_per_head("evict_at", evict_at, shape, q)
    check_integer("evict_at", evict_at)
    if cu_seqlens is not None:
        _check_packed(cu_seqlens, key_lengths, queries, keys)
        check_cu_seqlens(cu_seqlens, batch, keys, q)
    if query_position is not None:
        check_tensor("query_position", query_position, "[B, T]", [batch, queries], like=q)
        check_integer("query_position", query_position)
    if key_position is not None:
        if isinstance(key_position, Tensor) and key_position.dim() == 3:
            _check_per_head("key_position", key_position, shape, q)
        else:
            check_tensor("key_position", key_position, "[B, T]", shape[:2], like=q)
        check_integer("key_position", key_position)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, shape, q)
    if logit_bias is not None:
        _check_per_head("logit_bias", logit_bias, shape, q)
        check_floating("logit_bias", logit_bias)
        check_range("logit_bias", logit_bias, float("-inf"), torch.finfo(logit_bias.dtype).max)


def _check_per_head(name: str, value: Tensor, shape: list[int], like: Tensor) -> None:
    """Checks `[B, Tk, Hkv]` or `[B, Tk, 1]`."""
    shared = isinstance(value, Tensor) and value.dim() == 3 and value.shape[2] == 1
    sizes = [*shape[:2], 1 if shared else shape[2]]
    check_tensor(name, value, "[B, Tk, Hkv] or [B, Tk, 1]", sizes, like=like)


def _check_packed(cu_seqlens: Tensor, key_lengths: Tensor | None, queries: int, keys: int) -> None:
    if queries != keys:
        expected = "as many keys as queries in a packed batch"
        raise wrong("cu_seqlens", expected, f"{keys} keys, {queries} queries")
    if key_lengths is not None:
        expected = "None in a packed batch, whose borders are cu_seqlens"
        raise wrong("key_lengths", expected, key_lengths)


def _check_key_lengths(key_lengths: Tensor, shape: list[int], like: Tensor) -> None:
    batch, keys, kv_heads = shape
    by_row = isinstance(key_lengths, Tensor) and key_lengths.dim() == 1
    fits = by_row and key_lengths.shape[0] == batch
    sizes = [batch] if fits else [batch, kv_heads]
    check_tensor("key_lengths", key_lengths, "[B] or [B, Hkv]", sizes, like=like)
    check_integer("key_lengths", key_lengths)
    check_range("key_lengths", key_lengths, 0, keys)
