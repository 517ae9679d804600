"""FlexAttention over all keys with a block mask: the baseline for the other implementations.

FlexAttention visits blocks of keys, not single ones. Which blocks of keys a block of queries sees,
in part or whole, follows from the extremes of their positions and lifetimes, so no mask of queries
by keys is made. On a GPU flex_attention is compiled; on a CPU torch runs it unfused.
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
from hamblocks_ops.selected_attention.call import AttentionCall, learns
from hamblocks_ops.selected_attention.lists import Times, query_blocks, times

BLOCK = 128
"""Queries and keys of a block: what flex_attention is tuned for."""
MIN_DIM = 16
"""Smallest head size that its kernels take."""


def refused(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot run this call, or None."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return f"it needs the FlexAttention of torch 2.9 or newer, this is {torch.__version__}"
    if call.q.device.type == "cpu":
        return "FlexAttention has no backward on a CPU" if learns(call) else None
    if call.q.dtype == torch.float64:
        return "it computes in float32 at the most"
    if call.q.shape[3] < MIN_DIM:
        return f"FlexAttention takes head sizes from {MIN_DIM} on, not {call.q.shape[3]}"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
    arguments = {name: getattr(call, name) for name in call._fields}
    if not torch.is_grad_enabled():
        # FlexAttention looks at requires_grad alone, and would refuse on a CPU under no_grad
        arguments = {
            name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()
        }
    return flex(**arguments)


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
    # a key that no query sees may hold anything, and 0 * NaN is NaN
    unseen = ~_seen_at_all(time)[..., None]
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
    # flex_attention gives a query that sees nothing an arbitrary result
    blind = ~_sees_at_all(time, group)
    return out.transpose(1, 2).masked_fill(blind[..., None], 0), lse.masked_fill(
        blind, float("-inf")
    ).to(wide(q))


def _attend(q: Tensor) -> Callable[..., Any]:
    """flex_attention as this device runs it: on a GPU compiled, unless it is being traced."""
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
    """flex_attention without the warning that it runs unfused: naming it on a CPU asks for that."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attend(*args, **kwargs)

    return run


def _block_mask(time: Times, group: int, seen: Callable[..., Tensor]) -> Any:
    """FlexAttention's block mask: the blocks of keys seen in part, and those seen whole."""
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
    """Blocks of keys that a block of queries may see, and sees whole: bool `[B, Hkv, NQ, NK]`."""
    low, high = (x[:, None, :, None] for x in query_blocks(time.asked, BLOCK))
    stored = time.evict_at > time.position
    # smallest position, largest evict_at, largest position and smallest evict_at of the stored keys
    # of a block. A key that is not stored gets the fill, which changes no bound, or keeps its block
    # from being seen whole.
    extremes = []
    for x, fill, largest in (
        (time.position, NEVER, False),
        (time.evict_at, -1, True),
        (time.position, NEVER, True),
        (time.evict_at, -1, False),
    ):
        x = torch.where(stored, x, fill).transpose(1, 2)
        # keys beyond the last one are no reason for a mask: the largest position ignores them
        short = torch.nn.functional.pad(
            x, [0, -x.shape[2] % BLOCK], value=-1 if largest and fill == NEVER else fill
        )
        blocks = short.unflatten(2, (-1, BLOCK))
        extremes.append((blocks.amax(3) if largest else blocks.amin(3))[:, :, None])
    first, last_end, last, first_end = extremes
    return (first <= high) & (low < last_end), (last <= low) & (high < first_end)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are marked for each block of queries; and all, marked ones first."""
    order = blocks.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return blocks.sum(3, dtype=torch.int32), order.to(torch.int32)


def _seen_at_all(time: Times) -> Tensor:
    """Whether any query sees a key, bool `[B, Tk, Hkv]`: asks in position <= t < evict_at."""
    moments = time.asked.sort(1).values[:, None].contiguous()
    begin, end = (
        torch.searchsorted(
            moments.expand(-1, x.shape[2], -1).contiguous(), x.transpose(1, 2).contiguous()
        )
        for x in (time.position, time.evict_at)
    )
    return (end > begin).transpose(1, 2)


def _sees_at_all(time: Times, group: int) -> Tensor:
    """Whether a query sees any key, bool `[B, Tq, H]`: more have begun than have ended."""
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
