"""FlashAttention for ragged lengths over the selected keys, where that is exact.

FlashAttention knows two masks: none, and one that is causal from the bottom right. The stored keys of every row and
head are put side by side, one ragged sequence each, and

- the queries see a staircase: each sees one key more than the one before it, and the last sees all. So it is where the
  queries are the stored tokens, or the last of them. One causal call, with gradients.
- otherwise, without a gradient, queries go in blocks. What a whole block sees is one call without a mask, what comes or
  goes within the block is a small dense tile, and both are merged by their log-sum-exp. Decoding is the block of one.

Which keys these are is read on the host.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.dispatch import installed
from hamblocks_ops.packing import NEVER
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.lists import Times, times
from hamblocks_ops.selected_attention.sdpa import attend

QUERIES = 512
"""Queries of a block."""


class Ragged(NamedTuple):
    """Some keys of every row and head, side by side; rows of one head stand together.

    Attributes:
        index: int64 [L], where in `[Hkv, B, Tk]` a key stands.
        borders: int32 [Hkv * B + 1].
        longest: the most keys of a row and head.
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which nobody asks of a result
    borders: Tensor
    longest: int


def without_flash(q: Tensor) -> str | None:
    """Why no kernel runs on such tensors, or None."""
    if q.device.type != "cuda":
        return f"it has no kernel for tensors on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"its kernels take head sizes that are multiples of 8 up to 256, not {q.shape[3]}"
    if not installed("flash_attn") and not installed("torch.nn.attention.varlen"):
        return "neither flash_attn (pip install hamblocks[flash]) nor torch.nn.attention.varlen (torch 2.11) is there"
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
    """q `[Lq, G, D]`, k and v `[Lk, 1, D]`, borders int32 `[N+1]` -> out `[Lq, G, D]` and lse `[G, Lq]`."""
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

    takes = inspect.signature(varlen_attn).parameters
    more: dict[str, object] = (
        {"window_size": (-1, 0 if causal else -1)} if "window_size" in takes else {}
    )
    if not more:
        more = {"is_causal": causal}
    if "scale" in takes:
        more["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in takes:
        more["enable_gqa"] = True
    else:
        k, v = (x.expand(-1, q.shape[1], -1) for x in (k, v))
    more["return_aux"] = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, q_borders, k_borders, *most, **more)  # type: ignore[arg-type]
    return out, lse


def ragged(marked: Tensor) -> Ragged:
    """What is marked, bool `[B, Tk, Hkv]`; waits for the device."""
    by_head = marked.permute(2, 0, 1)
    lengths = by_head.sum(2).flatten()
    borders = pad(lengths.cumsum(0), [1, 0]).to(torch.int32)
    return Ragged(
        by_head.flatten().nonzero()[:, 0], borders, int(lengths.max()) if lengths.numel() else 0
    )


def gathered(x: Tensor, keys: Ragged) -> Tensor:
    """Keys or values `[B, Tk, Hkv, D]` as `[L, 1, D]`."""
    batch, tokens, heads, dim = x.shape
    head, rest = keys.index // (batch * tokens), keys.index % (batch * tokens)
    return x.reshape(batch * tokens * heads, dim)[rest * heads + head][:, None]


def staircase(time: Times) -> bool:
    """Whether every query sees, in their order, one stored key more than the query before it, and the last all."""
    asked = time.asked.long()
    queries = asked.shape[1]
    if queries == 0 or time.position.shape[1] == 0 or bool((asked.diff(dim=1) <= 0).any()):
        return False
    stored = (time.evict_at > time.position) & (time.position <= asked[:, -1, None, None])
    if bool((stored & (time.evict_at <= asked[:, -1, None, None])).any()):
        return False
    where = torch.where(stored, time.position, -1).cummax(1).values
    if bool((stored[:, 1:] & (time.position[:, 1:] < where[:, :-1])).any()):
        return False
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
        stored = (time.evict_at > time.position) & (
            time.position <= time.asked.amax(1)[:, None, None]
        )
        return _through(q, k, v, ragged(stored), True, scale)
    order = time.asked.argsort(
        stable=True, dim=1
    )  # so that a block of queries sees much as a whole
    results = [_block(q, k, v, time, which, scale) for which in order.split(QUERIES, 1)]
    out, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    back = order.argsort(1)[:, :, None].expand_as(lse)
    return out.gather(1, back[..., None].expand_as(out)), lse.gather(1, back)


def _block(
    q: Tensor, k: Tensor, v: Tensor, time: Times, which: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Out and lse of the queries `which` [B, i]."""
    heads, dim = q.shape[2:]
    asked = time.asked.gather(1, which)
    q = q.gather(1, which[:, :, None, None].expand(-1, -1, heads, dim))
    low, high = asked.amin(1)[:, None, None], asked.amax(1)[:, None, None]
    whole = (time.position <= low) & (high < time.evict_at)
    out, lse = _through(q, k, v, ragged(whole), False, scale)
    edge = (
        ~whole & (time.position <= high) & (low < time.evict_at) & (time.evict_at > time.position)
    )
    token = edge.any(2).any(0).nonzero()[:, 0]
    if len(token) == 0:
        return out, lse
    position, ends, edge = (
        x.index_select(1, token).permute(0, 2, 1) for x in (time.position, time.evict_at, edge)
    )
    seen = (position[:, :, None] <= asked[:, None, :, None]) & (
        asked[:, None, :, None] < ends[:, :, None]
    )
    seen = seen & edge[:, :, None]  # [B, Hkv, i, e]
    unseen = ~seen.any(2).transpose(1, 2)[..., None]
    arithmetic = wide(q)
    keys, values = (
        x.index_select(1, token).masked_fill(unseen, 0).to(arithmetic).transpose(1, 2)
        for x in (k, v)
    )
    group = heads // k.shape[2]
    keys, values, seen = (x.repeat_interleave(group, 1) for x in (keys, values, seen))
    mask = torch.zeros(seen.shape, dtype=arithmetic, device=q.device).masked_fill(
        ~seen, float("-inf")
    )
    part, sums = attend(q.to(arithmetic).transpose(1, 2), keys, values, mask, scale)
    blind = ~seen.any(3)
    part = part.masked_fill(blind[..., None], 0).transpose(1, 2)
    sums = sums.masked_fill(blind, float("-inf")).transpose(1, 2)
    both = torch.logaddexp(lse, sums)
    base = both.masked_fill(both == float("-inf"), 0)[..., None]
    return out * (lse[..., None] - base).exp() + part * (sums[..., None] - base).exp(), both


def _through(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Out and lse of queries `[B, i, H, D]` over the keys of their row and head; 0 and -inf where there are none."""
    batch, queries, _, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(2, 0, 1, 3, 4)  # [Hkv, B, i, G, D]
    group = grouped.shape[3]
    # without a mask the queries of a group are as good as more queries
    rows = grouped.flatten(0, 2) if causal else grouped.flatten(0, 3)[:, None]
    each = queries if causal else queries * group
    borders = torch.arange(kv_heads * batch + 1, dtype=torch.int32, device=q.device) * each
    if keys.longest == 0:
        out = torch.zeros_like(rows)
        lse = q.new_full(rows.shape[1::-1], float("-inf"), dtype=wide(q))
    else:
        most = each, keys.longest
        out, lse = varlen(
            rows, gathered(k, keys), gathered(v, keys), borders, keys.borders, most, causal, scale
        )
    lse = lse.detach().mT if causal else lse.detach()[0]
    shape = kv_heads, batch, queries, group
    out, lse = out.reshape(*shape, dim), lse.reshape(shape).to(wide(q))
    none = (keys.borders.diff() == 0).view(kv_heads, batch, 1, 1)
    out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, float("-inf"))
    return out.permute(1, 2, 0, 3, 4).flatten(2, 3), lse.permute(1, 2, 0, 3).flatten(2, 3)
