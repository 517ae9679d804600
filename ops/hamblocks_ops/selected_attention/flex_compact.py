"""FlexAttention over the stored keys: put side by side, so that it skips the blocks of the others.

Each list of keys (one batch row, one key/value head) is permuted. Keys that outlive every query
come first, then those with an end, ordered by the logarithm of their lifetime, and last the keys
that no query sees. Keys of a block then have similar lifetimes, and a block is skipped once all of
them are evicted. The lists are as long as the call has keys, so nothing waits for the device, and
the blocks at the end of a list that hold no stored key are never visited.

On a GPU FlexAttention runs kernels of its own, or those of FlashAttention-4 (`without_flash_4`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.dispatch import installed
from hamblocks_ops.packing import NEVER
from hamblocks_ops.selected_attention.block_mask import Keys, attend, seen_at_all, torch_version
from hamblocks_ops.selected_attention.call import AttentionCall
from hamblocks_ops.selected_attention.lists import Times

FIRST_TORCH = 2, 13
"""FlexAttention calls FlashAttention-4 from torch 2.11 on, but before this version its lse came out
wrong by a factor of ln 2 (pytorch#181645)."""
UNSEEN = 127
"""Class of a key that no query sees, behind all others. Classes are int8."""


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Runs a call; out is in the dtype of q."""
    options = {"BACKEND": "FLASH"} if without_flash_4(call) is None else None
    return attend(call, side_by_side, options)


def passed_over(call: AttentionCall) -> str:
    """Why "auto" does not take it, and which kernels it runs when it is named."""
    reason = without_flash_4(call)
    kernels = (
        "it runs the kernels of FlashAttention-4"
        if reason is None
        else f"it runs FlexAttention's own kernels and not those of FlashAttention-4: {reason}"
    )
    return f"it is not measured to be faster than the implementations before it; {kernels}"


def without_flash_4(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot run this call by FlashAttention-4's kernels, or None."""
    q, bias = call.q, call.logit_bias
    if q.device.type != "cuda":
        return f"they have no kernel for tensors on {q.device}"
    if torch_version() < FIRST_TORCH:
        return f"they need torch 2.13 or newer, this is {torch.__version__}"
    # of a missing package no submodule can be asked for
    if not (installed("flash_attn") and installed("flash_attn.cute")):
        return "flash-attn-4 is not installed"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"they take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"they take head sizes that are multiples of 8 up to 128, not {q.shape[3]}"
    if _capability(q.device.index or 0) < (9, 0):
        return "they need a GPU of compute capability 9.0 or newer"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "they have no gradient of logit_bias"
    if torch.are_deterministic_algorithms_enabled():
        return "their backward pass with a block mask is not deterministic"
    return None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# what torch.compiler.assume_constant_result does, without importing torch's compiler
setattr(_capability, "_dynamo_marked_constant", True)  # noqa: B010


class _Permute(torch.autograd.Function):
    """Permutes the keys of every list.

    The gradient takes the inverse permutation and is a gather as well, so that no two programs of a
    GPU ever add to one place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _take(grad, ctx.saved_tensors[0]), None, None


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The keys `[B, Hkv, Tk]` or `[B, Hkv, Tk, D]` in this order, int64 `[B, Hkv, Tk]`."""
    if x.dim() == 4:
        order = order[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, order)


def side_by_side(call: AttentionCall, time: Times) -> Keys:
    """The keys of every list, those that a query sees first."""
    seen = seen_at_all(time)
    order = classes(time, seen).transpose(1, 2).argsort(dim=2, stable=True)
    ranks = torch.arange(order.shape[2], device=order.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(2, order, ranks)

    def permuted(x: Tensor) -> Tensor:
        moved: Tensor = _Permute.apply(x.transpose(1, 2), order, inverse)  # type: ignore[no-untyped-call]
        return moved

    # a key that no query sees may hold anything, and 0 * NaN is NaN
    k, v = (permuted(x.masked_fill(~seen[..., None], 0)) for x in (call.k, call.v))
    position, evict_at = (
        permuted(torch.where(seen, x, fill))
        for x, fill in ((time.position, NEVER), (time.evict_at, -1))
    )
    bias = call.logit_bias
    return Keys(k, v, None if bias is None else permuted(bias), position, evict_at)


def classes(time: Times, seen: Tensor) -> Tensor:
    """By what a list is ordered, int8 `[B, Tk, Hkv]`.

    0 outlives every query of its sequence, 1 + n has a lifetime of about 2 ** n, UNSEEN is seen by
    no query.
    """
    lifetime = (time.evict_at.float() - time.position.float()).clamp(min=1)
    ending = 1 + lifetime.log2().to(torch.int8)
    return torch.where(time.lasting, 0, ending).masked_fill(~seen, UNSEEN).to(torch.int8)
