"""FlashAttention for ragged lengths over the stored keys, where that is exact.

FlashAttention knows two masks: none, and a causal one that is aligned at the bottom right. The
stored keys of every stream (one batch row, one key/value head) are put side by side as one ragged
sequence. Then there are two cases.

- The queries see a staircase: each query sees one key more than the query before it, and the last
  query sees all keys. This is so where the queries are the stored tokens, or the last of them. One
  causal call is exact, with gradients.
- Otherwise queries go in blocks, without a gradient. The keys that a whole block sees take one call
  without a mask. The keys that begin or end within the block are a small dense tile. Both are
  merged by their log-sum-exp. Decoding is a block of one query.

Which keys these are is read on the host, so every call waits for the device.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.compact.listing import marked
from hamblocks_ops.dispatch import installed
from hamblocks_ops.packing import NEVER
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.call import AttentionCall, learns
from hamblocks_ops.selected_attention.lists import Times, stored_by_the_end, times
from hamblocks_ops.selected_attention.merge import merge_into
from hamblocks_ops.selected_attention.sdpa import attend

BLOCK_QUERIES = 512
"""Queries of a block."""


class Ragged(NamedTuple):
    """Some keys of every stream, side by side; the streams of one head stand together.

    Attributes:
        index: int64 `[L]`, where in `[Hkv, B, Tk]` a key stands.
        borders: int32 `[Hkv * B + 1]`, where in `index` the streams begin.
        longest: the most keys of a stream.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    borders: Tensor
    longest: int


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
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


def refused(call: AttentionCall) -> str | None:
    """Why FlashAttention cannot run this call, or None; for a gradient it reads the lifetimes."""
    reason = without_flash(call.q)
    if reason is not None:
        return reason
    if call.logit_bias is not None:
        return "FlashAttention takes no bias"
    if torch.compiler.is_compiling():
        return "it reads on the host which keys are stored, and cannot be traced"
    if learns(call):
        time = times(call.query_position, call.key_position, call.evict_at, call.cu_seqlens)
        if call.cu_seqlens is not None or not staircase(time):
            return (
                "it has a gradient only where the queries are the last of the stored tokens, and "
                "in no packed batch"
            )
    return None


def without_flash(q: Tensor) -> str | None:
    """Why no kernel of FlashAttention takes such queries, or None."""
    if q.device.type != "cuda":
        return f"it has no kernel for tensors on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"its kernels take head sizes that are multiples of 8 up to 256, not {q.shape[3]}"
    if not installed("flash_attn") and not installed("torch.nn.attention.varlen"):
        return (
            "neither flash_attn (pip install hamblocks[flash]) nor torch.nn.attention.varlen "
            "(torch 2.11) is there"
        )
    return None


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_borders: Tensor,
    k_borders: Tensor,
    most: tuple[int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One call of FlashAttention: by flash_attn where it is installed, else by torch.

    Args:
        q: `[Lq, G, D]`, the queries of N streams side by side.
        k: `[Lk, 1, D]`, their keys.
        v: `[Lk, 1, D]`, their values.
        q_borders: int32 `[N+1]`.
        k_borders: int32 `[N+1]`.
        most: the most queries and the most keys of a stream.
        causal: whether the mask is causal, aligned at the bottom right.
        scale: factor of the logits.

    Returns:
        out `[Lq, G, D]` and lse `[G, Lq]`.
    """
    if installed("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            q_borders,
            k_borders,
            *most,
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,
        )
        return out, lse
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # the arguments of torch's function changed between releases
    takes = inspect.signature(varlen_attn).parameters
    more: dict[str, object] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in takes else {}
    )
    if not more:
        more = {"is_causal": causal}
    if "scale" in takes:
        more["scale"] = scale
    else:  # its scale is fixed to D ** -0.5, so the queries carry the rest
        q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in takes:
        more["enable_gqa"] = True
    else:
        k, v = (x.expand(-1, q.shape[1], -1) for x in (k, v))
    more["return_aux"] = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, q_borders, k_borders, *most, **more)  # type: ignore[arg-type]
    return out, lse


def ragged(mask: Tensor) -> Ragged:
    """The keys of a mask `[B, Tk, Hkv]`; waits for the device."""
    by_head = mask.permute(2, 0, 1)
    lengths = by_head.sum(2).flatten()
    borders = pad(lengths.cumsum(0), [1, 0]).to(torch.int32)
    index, _ = marked(by_head.flatten())
    return Ragged(index, borders, int(lengths.max()) if lengths.numel() else 0)


def gathered(x: Tensor, keys: Ragged) -> Tensor:
    """Keys or values `[B, Tk, Hkv, D]` as `[L, 1, D]`."""
    batch, tokens, heads, dim = x.shape
    head, rest = keys.index // (batch * tokens), keys.index % (batch * tokens)
    return x.reshape(batch * tokens * heads, dim)[rest * heads + head][:, None]


def staircase(time: Times) -> bool:
    """Whether each query sees one stored key more than the one before it, and the last sees all.

    Keys have to be stored in the order of time, too: FlashAttention's causal mask counts keys by
    where they stand.
    """
    asked = time.asked.long()
    queries = asked.shape[1]
    if queries == 0 or time.position.shape[1] == 0 or bool((asked.diff(dim=1) <= 0).any()):
        return False
    # queries ascend strictly from here on, so the last one is the latest
    stored = stored_by_the_end(time)
    # a key that is evicted before the last query would have to leave the staircase again
    if bool((stored & (time.evict_at <= asked[:, -1, None, None])).any()):
        return False
    # the latest position among the stored keys up to each key: a stored key before it is out of
    # order
    where = torch.where(stored, time.position, -1).cummax(1).values
    if bool((stored[:, 1:] & (time.position[:, 1:] < where[:, :-1])).any()):
        return False
    # how many keys each query sees, against how many a staircase that ends with all keys lets it
    # see
    moments = (
        torch.where(stored, time.position, NEVER).transpose(1, 2).contiguous().sort(2).values.long()
    )
    heads = moments.shape[1]
    seen = torch.searchsorted(
        moments, asked[:, None].expand(-1, heads, -1).contiguous(), right=True
    )
    wanted = stored.sum(1)[..., None] - torch.arange(queries - 1, -1, -1, device=asked.device)
    return bool((seen == wanted).all())


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    *,
    scale: float,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `reference`; returns out and lse."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=wide(q))
    time = times(query_position, key_position, evict_at, cu_seqlens)
    if cu_seqlens is None and q.shape[1] > 1 and staircase(time):
        return _through(q, k, v, ragged(stored_by_the_end(time)), True, scale)
    # queries that ask at about the same time share a block, so that the block sees much as a whole
    order = time.asked.argsort(stable=True, dim=1)
    results = [_block(q, k, v, time, which, scale) for which in order.split(BLOCK_QUERIES, 1)]
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    back = order.argsort(1)[:, :, None].expand_as(lse)
    return out.gather(1, back[..., None].expand_as(out)), lse.gather(1, back)


def _block(
    q: Tensor, k: Tensor, v: Tensor, time: Times, which: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Out `[B, i, H, D]` and lse `[B, i, H]` of the queries `which`, int64 `[B, i]`."""
    heads, dim = q.shape[2:]
    asked = time.asked.gather(1, which)
    q = q.gather(1, which[:, :, None, None].expand(-1, -1, heads, dim))
    low, high = asked.amin(1)[:, None, None], asked.amax(1)[:, None, None]
    # what every query of the block sees: one call without a mask
    whole = (time.position <= low) & (high < time.evict_at)
    out, lse = _through(q, k, v, ragged(whole), False, scale)
    # what some of them see: a dense tile over the tokens that any stream has at the edge
    edge = (
        ~whole & (time.position <= high) & (low < time.evict_at) & (time.evict_at > time.position)
    )
    token = edge.any(2).any(0).nonzero()[:, 0]
    if len(token) == 0:
        return out, lse
    part, sums = _tile(q, k, v, time, token, asked, edge, scale)
    out = out.to(wide(q))
    return out, merge_into(out, lse, part, sums)


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time: Times,
    token: Tensor,
    asked: Tensor,
    edge: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention with a dense mask over a few tokens.

    Args:
        q: `[B, i, H, D]`, the queries of a block.
        k: `[B, Tk, Hkv, D]`.
        v: `[B, Tk, Hkv, D]`.
        time: positions and lifetimes of all keys.
        token: int64 `[e]`, the tokens of the tile, the same ones for every stream.
        asked: int32 `[B, i]`, the times of the queries.
        edge: bool `[B, Tk, Hkv]`, which keys count; the others of `token` are hidden.
        scale: factor of the logits.

    Returns:
        out `[B, i, H, D]` and lse `[B, i, H]`, float32 or float64; 0 and -inf where nothing is
        seen.
    """
    position, ends, edge = (
        x.index_select(1, token).permute(0, 2, 1) for x in (time.position, time.evict_at, edge)
    )
    moment = asked[:, None, :, None]
    seen = (position[:, :, None] <= moment) & (moment < ends[:, :, None]) & edge[:, :, None]
    # [B, Hkv, i, e]; a key that no query sees may hold anything, and 0 * NaN is NaN
    unseen = ~seen.any(2).transpose(1, 2)[..., None]
    arithmetic = wide(q)
    keys, values = (
        x.index_select(1, token).masked_fill(unseen, 0).to(arithmetic).transpose(1, 2)
        for x in (k, v)
    )
    group = q.shape[2] // k.shape[2]
    keys, values, seen = (x.repeat_interleave(group, 1) for x in (keys, values, seen))
    mask = torch.zeros(seen.shape, dtype=arithmetic, device=q.device)
    mask = mask.masked_fill(~seen, float("-inf"))
    part, sums = attend(q.to(arithmetic).transpose(1, 2), keys, values, mask, scale)
    blind = ~seen.any(3)
    part = part.masked_fill(blind[..., None], 0).transpose(1, 2)
    return part, sums.masked_fill(blind, float("-inf")).transpose(1, 2)


def _through(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Out and lse of queries `[B, i, H, D]` over the keys of their stream.

    0 and -inf where there are none.
    """
    batch, queries, _, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(2, 0, 1, 3, 4)  # [Hkv, B, i, G, D]
    group = grouped.shape[3]
    # without a mask it does not matter which query is which: those of a group count as more queries
    # of one head
    flat = grouped.flatten(0, 2) if causal else grouped.flatten(0, 3)[:, None]
    each = queries if causal else queries * group
    borders = torch.arange(kv_heads * batch + 1, dtype=torch.int32, device=q.device) * each
    if keys.longest == 0:
        out = torch.zeros_like(flat)
        lse = q.new_full(flat.shape[1::-1], float("-inf"), dtype=wide(q))
    else:
        most = each, keys.longest
        out, lse = varlen(
            flat, gathered(k, keys), gathered(v, keys), borders, keys.borders, most, causal, scale
        )
    # lse has no gradient in this op, though FlashAttention's has one
    lse = lse.detach().mT if causal else lse.detach()[0]
    shape = kv_heads, batch, queries, group
    out, lse = out.reshape(*shape, dim), lse.reshape(shape).to(wide(q))
    # kernels leave what has no key undefined
    none = (keys.borders.diff() == 0).view(kv_heads, batch, 1, 1)
    out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, float("-inf"))
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3), lse.permute(1, 2, 0, 3).flatten(2, 3)
