"""FlexAttention over keys in a given order, with a block mask from the extremes of their times.

FlexAttention visits blocks of keys, not single ones. Which blocks of keys a block of queries sees,
in part or whole, follows from the extremes of their positions and lifetimes, so no mask of queries
by keys is made and nothing waits for the device. On a GPU flex_attention is compiled, on a CPU
torch runs it unfused. `flex` hands over the keys as they come, `flex_compact` the stored ones
first.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

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
MAX_COMPILATIONS = 64
"""Shapes that a process compiles flex_attention for. Beyond it torch raises: it would run unfused
and make the whole matrix of logits."""


class Keys(NamedTuple):
    """Keys in the order in which FlexAttention reads them; a key that no query sees holds 0.

    Attributes:
        k: `[B, Hkv, Tk, D]`.
        v: `[B, Hkv, Tk, D]`.
        logit_bias: `[B, Hkv, Tk]`, or None.
        position: int32 `[B, Hkv, Tk]`.
        evict_at: int32 `[B, Hkv, Tk]`.
    """

    k: Tensor
    v: Tensor
    logit_bias: Tensor | None
    position: Tensor
    evict_at: Tensor


def torch_version() -> tuple[int, ...]:
    """Major and minor version of torch."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def refused(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot run this call, or None."""
    if torch_version() < (2, 9):
        return f"it needs the FlexAttention of torch 2.9 or newer, this is {torch.__version__}"
    if call.q.device.type == "cpu":
        return "FlexAttention has no backward on a CPU" if learns(call) else None
    if call.q.dtype == torch.float64:
        return "it computes in float32 at the most"
    if call.q.shape[3] < MIN_DIM:
        return f"FlexAttention takes head sizes from {MIN_DIM} on, not {call.q.shape[3]}"
    return None


def attend(
    call: AttentionCall,
    arrange: Callable[[AttentionCall, Times], Keys],
    kernel_options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a call over the keys in the order that `arrange` gives them.

    Returns:
        out in the dtype of q, and lse.
    """
    if not torch.is_grad_enabled():
        # FlexAttention looks at requires_grad alone, and would refuse on a CPU under no_grad
        bias = call.logit_bias
        call = call._replace(
            q=call.q.detach(),
            k=call.k.detach(),
            v=call.v.detach(),
            logit_bias=None if bias is None else bias.detach(),
        )
    q, group = call.q, call.q.shape[2] // call.k.shape[2]
    if q.numel() == 0 or call.k.numel() == 0:
        return _nothing(call), q.new_full(q.shape[:3], float("-inf"), dtype=wide(q))
    time = times(call.query_position, call.key_position, call.evict_at, call.cu_seqlens)
    keys = arrange(call, time)
    out, lse = _kernel(q)(
        q.transpose(1, 2),
        keys.k,
        keys.v,
        score_mod=None if keys.logit_bias is None else _biased(keys.logit_bias.to(wide(q)), group),
        block_mask=_block_mask(time.asked, keys, group),
        scale=call.scale,
        enable_gqa=group > 1,
        kernel_options=kernel_options,
    )
    # flex_attention gives a query that sees nothing an arbitrary result
    blind = ~sees_at_all(time, group)
    lse = lse.transpose(1, 2).masked_fill(blind, float("-inf"))
    return out.transpose(1, 2).masked_fill(blind[..., None], 0), lse.to(wide(q))


def _nothing(call: AttentionCall) -> Tensor:
    """Out of a call without a query or without a key: 0, with gradients 0 for every argument."""
    out = call.q.masked_fill(torch.ones_like(call.q, dtype=torch.bool), 0)
    for x in (call.k, call.v, call.logit_bias):
        if x is not None:
            # a sum over no key is 0; without a query there is nothing to add it to
            out = out + x.sum().to(out.dtype)
    return out


def _biased(bias: Tensor, group: int) -> Callable[..., Tensor]:
    """FlexAttention's score_mod that adds a bias `[B, Hkv, Tk]`."""

    def add(logit: Tensor, b: Tensor, h: Tensor, _i: Tensor, j: Tensor) -> Tensor:
        return logit + bias[b, h // group, j]

    return add


def _kernel(q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """flex_attention as this device runs it: on a GPU compiled, unless it is being traced."""
    if torch.compiler.is_compiling():
        return _flex_attention
    return _unfused if q.device.type == "cpu" else _compiled()


def _flex_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Out, and lse without a gradient.

    lse is detached here, inside of what is compiled. Otherwise torch would compile a backward pass
    with a gradient of lse, which FlashAttention-4's kernels refuse.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, more = flex_attention(*args, **kwargs, return_aux=AuxRequest(lse=True))
    return out, more.lse.detach()


@functools.cache
def _compiled(**how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """flex_attention compiled, once for every shape."""
    compiled = torch.compile(_flex_attention, dynamic=False, fullgraph=True, **how)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
            result: tuple[Tensor, Tensor] = compiled(*args, **kwargs)
            return result

    return run


def _unfused(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Without torch's warning that it runs unfused: naming it on a CPU asks for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _flex_attention(*args, **kwargs)


def _block_mask(asked: Tensor, keys: Keys, group: int) -> Any:
    """FlexAttention's block mask: the blocks of keys seen in part, and those seen whole."""
    from torch.nn.attention.flex_attention import BlockMask

    position, ends = keys.position, keys.evict_at

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        here = h // group
        return (position[b, here, j] <= asked[b, i]) & (asked[b, i] < ends[b, here, j])

    some, whole = (x.repeat_interleave(group, 1) for x in visited(asked, position, ends))
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(asked.shape[1], position.shape[2]),
    )


def visited(asked: Tensor, position: Tensor, evict_at: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of keys that a block of queries may see, and sees whole: bool `[B, Hkv, NQ, NK]`.

    Asked is `[B, Tq]`, position and evict_at are `[B, Hkv, Tk]`.
    """
    low, high = (x[:, None, :, None] for x in query_blocks(asked, BLOCK))
    stored = evict_at > position
    # smallest position, largest evict_at, largest position and smallest evict_at of the stored keys
    # of a block. A key that is not stored gets the fill, which changes no bound, or keeps its block
    # from being seen whole.
    extremes = []
    for x, fill, largest in (
        (position, NEVER, False),
        (evict_at, -1, True),
        (position, NEVER, True),
        (evict_at, -1, False),
    ):
        # keys beyond the last one are no reason for a mask: the largest position ignores them
        short = torch.nn.functional.pad(
            torch.where(stored, x, fill),
            [0, -x.shape[2] % BLOCK],
            value=-1 if largest and fill == NEVER else fill,
        )
        blocks = short.unflatten(2, (-1, BLOCK))
        extremes.append((blocks.amax(3) if largest else blocks.amin(3))[:, :, None])
    first, last_end, last, first_end = extremes
    return (first <= high) & (low < last_end), (last <= low) & (high < first_end)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are marked for each block of queries; and all, marked ones first."""
    order = blocks.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return blocks.sum(3, dtype=torch.int32), order.to(torch.int32)


def seen_at_all(time: Times) -> Tensor:
    """Whether any query sees a key, bool `[B, Tk, Hkv]`: asks in position <= t < evict_at."""
    moments = time.asked.sort(1).values[:, None].contiguous()
    begin, end = (
        torch.searchsorted(
            moments.expand(-1, x.shape[2], -1).contiguous(), x.transpose(1, 2).contiguous()
        )
        for x in (time.position, time.evict_at)
    )
    return (end > begin).transpose(1, 2)


def sees_at_all(time: Times, group: int) -> Tensor:
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
