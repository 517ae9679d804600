"""Tiles of attention: visibility, one step of an online softmax, and its gradient.

Logits are in base 2 throughout, because the hardware computes exp2. A tile is [M queries, N keys].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(asked, position, evict_at):
    """Which of the keys [N] each query [M] sees: position <= asked < evict_at."""
    return (position[None, :] <= asked[:, None]) & (asked[:, None] < evict_at[None, :])


@triton.jit
def logits(q, k, bias, scale):
    """Logits in base 2 [M, N] of q [M, D] and k [N, D], with a bias [N] (natural) for every key."""
    return tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + bias[None, :] * LOG2E


@triton.jit
def new_peak(top, logit):
    """The larger of two logits [M], and what to subtract before exp2: 0 where both are -inf.

    Their logits then stay at exp2(-inf) = 0, where exp2(-inf - -inf) would be NaN.
    """
    higher = tl.maximum(top, logit)
    return higher, tl.where(higher == float("-inf"), 0.0, higher)


@triton.jit
def softmax_step(logit, v, out, top, total):
    """Adds a tile to the running sums of an online softmax.

    out [M, D] and total [M] are sums of weights relative to 2 ** top [M]. When a tile raises the
    peak, both are scaled down first. Hidden logits are -inf. Returns out, top and total.
    """
    higher, base = new_peak(top, tl.max(logit, 1))
    weight = tl.exp2(logit - base[:, None])
    fade = tl.exp2(top - base)
    out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
    return out, higher, total * fade + tl.sum(weight, 1)


@triton.jit
def softmax_grad(logit, lse, wanted, v, delta):
    """Weights and the gradient of the natural logits [M, N] of a softmax with a known lse.

    lse [M] is in base 2, +inf for queries that saw nothing; wanted is the gradient of out, delta
    its product with out.
    """
    weight = tl.exp2(logit - lse[:, None])
    return weight, weight * (tl.dot(wanted, tl.trans(v), input_precision="ieee") - delta[:, None])
