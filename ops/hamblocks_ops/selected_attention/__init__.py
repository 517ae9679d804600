"""Softmax attention over the tokens that a policy stored, at the cost of what it stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_floating,
    check_integer,
    check_range,
    check_tensor,
    wrong,
)
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    always,
    explain_table,
    interpreted,
    pick,
    without_triton,
)
from hamblocks_ops.packing import positions


class AttentionOutput(NamedTuple):
    """Result of `selected_attention`.

    Attributes:
        out: `[B, Tq, H, D]`, dtype of q.
        lse: `[B, Tq, H]`, float32 (float64 for float64 inputs): natural log of the sum of the exponentiated logits,
            -inf where a query sees nothing. It carries no gradient.
    """

    out: Tensor
    lse: Tensor


class AttentionCall(NamedTuple):
    """One checked call: what an implementation is given. Positions and lifetimes are int32, expanded to every head."""

    q: Tensor
    k: Tensor
    v: Tensor
    evict_at: Tensor
    scale: float
    logit_bias: Tensor | None
    query_position: Tensor
    key_position: Tensor
    cu_seqlens: Tensor | None


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

    A query that sees nothing reads 0, has lse = -inf and passes no gradient. There is no implicit self-visibility.

    Args:
        q: `[B, Tq, H, D]`, any floating dtype.
        k: `[B, Tk, Hkv, D]`, same dtype; H is a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        v: `[B, Tk, Hkv, D]`, same dtype.
        evict_at: int32 `[B, Tk, Hkv]` or `[B, Tk, 1]`: the first position that no longer sees token j.
        scale: factor of the logits; None: D ** -0.5.
        logit_bias: `[B, Tk, Hkv]` or `[B, Tk, 1]`, floating, added to the logits of key j, differentiable;
            -inf hides the key.
        cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one row (B = 1, Tq = Tk).
        query_position: int `[B, Tq]`, within the sequence; None: counted from 0.
        key_position: int `[B, Tk]` or `[B, Tk, Hkv]`; None: counted from 0. With both, the keys are a cache.
        key_lengths: int `[B]` or `[B, Hkv]`: keys from there on are padding. None: all are there.
        impl: "triton" (a GPU kernel over the stored keys; bfloat16, float16, float32, head sizes up to 256), "gather"
            (SDPA over the stored keys, any device), "reference" (dense mask), or "auto", which takes one of these.
            "flash": FlashAttention for ragged lengths on a GPU, where it is exact: decoding, inference, and queries
            that are the stored tokens. "flex": FlexAttention over all keys, the baseline.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    call = _checked(
        q, k, v, evict_at, scale, logit_bias, cu_seqlens, query_position, key_position, key_lengths
    )
    run = pick("selected_attention", TABLE, impl, call)
    with torch.autocast(device_type=q.device.type, enabled=False):
        out, lse = run(call)
    return AttentionOutput(out.to(q.dtype), lse)


def explain(
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
) -> Explanation:
    """Every implementation of `selected_attention` with "yes", or the reason why it cannot run this call."""
    call = _checked(
        q, k, v, evict_at, scale, logit_bias, cu_seqlens, query_position, key_position, key_lengths
    )
    return explain_table(TABLE, call)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    scale: float | None,
    logit_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    key_lengths: Tensor | None,
) -> AttentionCall:
    check_tensor("q", q, "[B, Tq, H, D]", [None] * 4)
    check_floating("q", q)
    batch, queries, heads, dim = q.shape
    check_tensor("k", k, "[B, Tk, Hkv, D]", [batch, None, None, dim], like=q)
    check_floating("k", k, like=q)
    keys, kv_heads = k.shape[1:3]
    check_tensor("v", v, "[B, Tk, Hkv, D]", [batch, keys, kv_heads, dim], like=q)
    check_floating("v", v, like=q)
    if kv_heads == 0 or heads % kv_heads != 0:
        raise wrong(
            "k", f"a number of heads that divides the {heads} heads of q", f"{kv_heads} heads"
        )
    shape = [batch, keys, kv_heads]
    evict_at = _per_head("evict_at", evict_at, shape, q)
    check_integer("evict_at", evict_at)
    if cu_seqlens is not None:
        if queries != keys:
            raise wrong(
                "cu_seqlens",
                "as many keys as queries in a packed batch",
                f"{keys} keys, {queries} queries",
            )
        if key_lengths is not None:
            raise wrong(
                "key_lengths", "None in a packed batch, whose borders are cu_seqlens", key_lengths
            )
        check_cu_seqlens(cu_seqlens, batch, keys, q)
    query_position = _position("query_position", query_position, [batch, queries], q, cu_seqlens)
    key_position = _position("key_position", key_position, [batch, keys], q, cu_seqlens)
    key_position = _per_head(
        "key_position",
        key_position[..., None] if key_position.dim() == 2 else key_position,
        shape,
        q,
    )
    if key_lengths is not None:
        if isinstance(key_lengths, Tensor) and key_lengths.dim() == 1:
            key_lengths = (
                key_lengths[:, None].expand(batch, kv_heads)
                if key_lengths.shape[0] == batch
                else key_lengths
            )
        check_tensor("key_lengths", key_lengths, "[B] or [B, Hkv]", [batch, kv_heads], like=q)
        check_integer("key_lengths", key_lengths)
        check_range("key_lengths", key_lengths, 0, keys)
        beyond = torch.arange(keys, device=q.device)[None, :, None] >= key_lengths[:, None]
        evict_at = torch.where(beyond, key_position, evict_at)
    if logit_bias is not None:
        logit_bias = _per_head("logit_bias", logit_bias, shape, q)
        check_floating("logit_bias", logit_bias)
        check_range("logit_bias", logit_bias, float("-inf"), torch.finfo(logit_bias.dtype).max)
        hidden = logit_bias == float("-inf")
        evict_at = torch.where(hidden, key_position, evict_at)
        logit_bias = logit_bias.masked_fill(hidden, 0)
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        evict_at=evict_at.to(torch.int32),
        scale=dim**-0.5 if scale is None else float(scale),
        logit_bias=logit_bias,
        query_position=query_position.to(torch.int32),
        key_position=key_position.to(torch.int32),
        cu_seqlens=cu_seqlens,
    )


def _per_head(name: str, value: Tensor, shape: list[int], like: Tensor) -> Tensor:
    """Checks [B, Tk, Hkv] or [B, Tk, 1] and expands to every key head."""
    shared = isinstance(value, Tensor) and value.dim() == 3 and value.shape[2] == 1
    check_tensor(
        name,
        value,
        "[B, Tk, Hkv] or [B, Tk, 1]",
        [*shape[:2], 1 if shared else shape[2]],
        like=like,
    )
    return value.expand(*shape)


def _position(
    name: str, value: Tensor | None, shape: list[int], like: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    if value is None:
        return positions(*shape, device=like.device, cu_seqlens=cu_seqlens)
    if name == "query_position" or not isinstance(value, Tensor) or value.dim() != 3:
        check_tensor(name, value, "[B, T]", shape, like=like)
    check_integer(name, value)
    return value


def _run_reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.reference import reference

    return reference(
        call.q,
        call.k,
        call.v,
        call.evict_at,
        scale=call.scale,
        logit_bias=call.logit_bias,
        query_position=call.query_position,
        key_position=call.key_position,
        cu_seqlens=call.cu_seqlens,
    )


def _run_gather(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.gather import gather

    result: tuple[Tensor, Tensor] = gather(
        call.q,
        call.k,
        call.v,
        call.evict_at,
        call.logit_bias,
        call.query_position,
        call.key_position,
        call.cu_seqlens,
        call.scale,
    )
    return result


def _learns(call: AttentionCall) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.logit_bias)
    )


def _refused_by_flex(call: AttentionCall) -> str | None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return f"it needs the FlexAttention of torch 2.9 or newer, this is {torch.__version__}"
    if call.q.device.type == "cpu":
        return "FlexAttention has no backward on a CPU" if _learns(call) else None
    if call.q.dtype == torch.float64:
        return "it computes in float32 at the most"
    return (
        f"FlexAttention takes head sizes from 16 on, not {call.q.shape[3]}"
        if call.q.shape[3] < 16
        else None
    )


def _baseline(_call: AttentionCall) -> str:
    return "it is the baseline, for it visits what is not stored"


def _run_flex(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.flex import flex

    tensors = {name: getattr(call, name) for name in call._fields}
    if not torch.is_grad_enabled():  # FlexAttention asks the tensors alone
        tensors = {name: x.detach() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    return flex(**tensors)


def _refused_by_flash(call: AttentionCall) -> str | None:
    from hamblocks_ops.selected_attention import flash
    from hamblocks_ops.selected_attention.lists import times

    reason = flash.without_flash(call.q)
    if reason is None and call.logit_bias is not None:
        reason = "FlashAttention takes no bias"
    if reason is None and torch.compiler.is_compiling():
        reason = "it reads on the host which keys are stored, and cannot be traced"
    if reason is None and _learns(call):
        time = times(call.query_position, call.key_position, call.evict_at, call.cu_seqlens)
        if call.cu_seqlens is not None or not flash.staircase(time):
            reason = (
                "it has a gradient only where the queries are the last of the stored tokens, and in "
                "no packed batch"
            )
    return reason


def _waits(_call: AttentionCall) -> str:
    return "it waits for the device to tell which keys are stored"


def _run_flash(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.flash import flash

    return flash(
        call.q,
        call.k,
        call.v,
        call.evict_at,
        scale=call.scale,
        query_position=call.query_position,
        key_position=call.key_position,
        cu_seqlens=call.cu_seqlens,
    )


def _refused_by_triton(call: AttentionCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "it computes in float32 at the most"
    if call.q.shape[3] > 256:
        return f"a tile holds head sizes up to 256, not {call.q.shape[3]}"
    return without_triton(call.q)


def _run_triton(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.selected_attention.triton import attend

    out, lse, _ = attend(
        call.q,
        call.k,
        call.v,
        call.evict_at,
        call.logit_bias,
        call.query_position,
        call.key_position,
        call.cu_seqlens,
        call.scale,
        _learns(call),
    )
    return out, lse


TABLE = (
    Implementation("triton", _refused_by_triton, lambda: _run_triton, interpreted),
    Implementation("gather", always, lambda: _run_gather),
    Implementation("flash", _refused_by_flash, lambda: _run_flash, _waits),
    Implementation("flex", _refused_by_flex, lambda: _run_flex, _baseline),
    Implementation("reference", always, lambda: _run_reference),
)
