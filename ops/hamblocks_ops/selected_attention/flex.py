"""FlexAttention over all keys with a mask of blocks, as the paper computes it: the baseline that others have to beat.

Which blocks a block of queries sees, in part or whole, follows from the extremes of their positions and lifetimes; no
mask of queries by keys is ever made. On a GPU flex_attention is compiled, on a CPU torch runs it unfused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.packing import NEVER
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.lists import Times, query_blocks, times

BLOCK = 128
"""Queries and keys of a block: what flex_attention is tuned for."""


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    *,
    scale: float,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `reference`; returns out in the dtype of q, and lse."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=wide(q))
    from torch.nn.attention.flex_attention import AuxRequest

    time = times(query_position, key_position, evict_at, cu_seqlens)
    group = q.shape[2] // k.shape[2]
    asked, position, ends = time.asked, time.position, time.evict_at

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        here = h // group
        return (position[b, j, here] <= asked[b, i]) & (asked[b, i] < ends[b, j, here])

    score: Callable[..., Tensor] | None = None
    if logit_bias is not None:
        bias = logit_bias.to(wide(q))

        def biased(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return logit + bias[b, j, h // group]

        score = biased
    unseen = ~_seen_at_all(time)[..., None]  # what nobody sees may be anything, and 0 * NaN is NaN
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    given = (x.transpose(1, 2) for x in (q, k, v))
    out, more = _attend(q)(
        *given,
        score_mod=score,
        block_mask=_block_mask(time, group, seen),
        scale=scale,
        enable_gqa=group > 1,
        return_aux=AuxRequest(lse=True),
    )
    lse = more.lse.detach().transpose(1, 2)
    blind = ~_sees_at_all(time, group)
    return out.transpose(1, 2).masked_fill(blind[..., None], 0), lse.masked_fill(
        blind, float("-inf")
    ).to(wide(q))


def _attend(q: Tensor) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    if q.device.type == "cpu":
        return _unfused(flex_attention)
    return _compiled()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _unfused(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Without the warning that it is; who names it on a CPU knows."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attend(*args, **kwargs)

    return run


def _block_mask(time: Times, group: int, seen: Callable[..., Tensor]) -> Any:
    """Blocks of keys that a block of queries sees in part, and those that it sees whole."""
    from torch.nn.attention.flex_attention import BlockMask

    some, whole = (x.repeat_interleave(group, 1) for x in visited(time))
    lengths = time.asked.shape[1], time.position.shape[1]
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=lengths,
    )


def visited(time: Times) -> tuple[Tensor, Tensor]:
    """Of every block of queries, which blocks of keys it may see and which it sees whole: bool `[B, Hkv, NQ, NK]`."""
    low, high = (x[:, None, :, None] for x in query_blocks(time.asked, BLOCK))
    stored = time.evict_at > time.position
    extremes = []
    for x, fill, largest in (
        (time.position, NEVER, False),
        (time.evict_at, -1, True),
        (time.position, NEVER, True),
        (time.evict_at, -1, False),
    ):
        x = torch.where(stored, x, fill).transpose(1, 2)
        short = torch.nn.functional.pad(
            x, [0, -x.shape[2] % BLOCK], value=-1 if largest and fill == NEVER else fill
        )
        rows = short.unflatten(2, (-1, BLOCK))
        extremes.append((rows.amax(3) if largest else rows.amin(3))[:, :, None])
    first, last_end, last, first_end = extremes
    return (first <= high) & (low < last_end), (last <= low) & (high < first_end)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are marked, and which: those first, in their order."""
    order = blocks.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return blocks.sum(3, dtype=torch.int32), order.to(torch.int32)


def _seen_at_all(time: Times) -> Tensor:
    """Whether any query sees a key, bool `[B, Tk, Hkv]`."""
    moments = time.asked.sort(1).values[:, None].contiguous()
    begin, end = (
        torch.searchsorted(
            moments.expand(-1, x.shape[2], -1).contiguous(), x.transpose(1, 2).contiguous()
        )
        for x in (time.position, time.evict_at)
    )
    return (end > begin).transpose(1, 2)


def _sees_at_all(time: Times, group: int) -> Tensor:
    """Whether a query sees any key, bool `[B, Tq, H]`: as many have begun as have ended where it sees none."""
    stored = time.evict_at > time.position
    asked = time.asked[:, None].expand(-1, stored.shape[2], -1).contiguous()
    begun, ended = (
        torch.searchsorted(
            torch.where(stored, x, NEVER).transpose(1, 2).contiguous().sort(2).values,
            asked,
            right=True,
        )
        for x in (time.position, time.evict_at)
    )
    return (begun > ended).transpose(1, 2).repeat_interleave(group, 2)
