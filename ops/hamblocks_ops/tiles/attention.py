"""Tiles of attention: visibility, one step of an online softmax, and its gradient.

Logits are in base 2 throughout, because the hardware computes exp2. A tile is [M queries, N keys]. A
product times a factor less a number is one instruction, so the scale of the logits is applied where
exp2 is taken, and not before.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(2.0**-126)
"""Takes the place of a factor 0, which would turn a hidden logit, -inf, into NaN."""


@triton.jit
def visible(asked, position, evict_at):
    """Which of the keys [N] each query [M] sees: position <= asked < evict_at."""
    return (position[None, :] <= asked[:, None]) & (asked[:, None] < evict_at[None, :])


@triton.jit
def some_see(asked, position, evict_at):
    """Which of the keys [N] any of the queries [M] sees.

    It is a tile of its own and not a sum of `visible`, whose [M, N] would otherwise hold registers
    from here on.
    """
    seen = (position[:, None] <= asked[None, :]) & (asked[None, :] < evict_at[:, None])
    return tl.max(seen.to(tl.int32), 1) > 0


@triton.jit
def products(q, k):
    """q k^T [M, N] of q [M, D] and k [N, D]."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def with_bias(product, bias, factor, HAS_BIAS: tl.constexpr):
    """Products [M, N] times a factor plus a bias [N] in base 2; without a bias, as they are."""
    if HAS_BIAS:
        return product * factor + bias[None, :]
    return product


@triton.jit
def new_peak(top, logit):
    """The larger of two logits [M], and what to subtract before exp2: 0 where both are -inf.

    Their logits then stay at exp2(-inf) = 0, where exp2(-inf - -inf) would be NaN.
    """
    higher = tl.maximum(top, logit)
    return higher, tl.where(higher == float("-inf"), 0.0, higher)


@triton.jit
def softmax_step(logit, v, out, top, total, factor):
    """Adds a tile to the running sums of an online softmax.

    out [M, D] and total [M] are sums of weights relative to 2 ** top [M]. When a tile raises the
    peak, both are scaled down first. The logits are `logit` times a positive factor; hidden ones are
    -inf. Returns out, top and total.
    """
    higher, base = new_peak(top, tl.max(logit, 1) * factor)
    weight = tl.exp2(logit * factor - base[:, None])
    fade = tl.exp2(top - base)
    out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
    return out, higher, total * fade + tl.sum(weight, 1)
