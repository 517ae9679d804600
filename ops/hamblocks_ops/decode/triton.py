"""Kernels of `hamblocks_ops.decode`. A program owns one head of one token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamblocks_ops.decode.call import Convolution, Heads, Rotation
from hamblocks_ops.dispatch import launches
from hamblocks_ops.precision import wide

COMPETING = 1024
"""Slots that a token competes with at a time."""

PARTS = 3
"""Parts that one launch takes: queries, keys and values."""


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def cos_and_sin(angle):
    """Cosine and sine of angles of at least 0, computed in float64 without a call of a library.

    The angle is reduced to [-pi/4, pi/4] and a number of right angles. The terms that the series
    leave out are below 1e-16 there.
    """
    x = angle.to(tl.float64)
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    x = (x - turns * 1.5707963267948966) - turns * 6.123233995736766e-17
    s = x * x
    sine = s * (2.7557319223985893e-06 + s * (-2.505210838544172e-08 + s * (
        1.6059043836821613e-10 + s * -7.647163731819816e-13)))  # fmt: skip
    sine = x + x * s * (-0.16666666666666666 + s * (
        0.008333333333333333 + s * (-0.0001984126984126984 + sine)))  # fmt: skip
    cosine = s * (2.48015873015873e-05 + s * (-2.755731922398589e-07 + s * (
        2.08767569878681e-09 + s * (-1.1470745597729725e-11 + s * 4.779477332387385e-14))))  # fmt: skip
    cosine = 1.0 + s * (-0.5 + s * (0.041666666666666664 + s * (-0.001388888888888889 + cosine)))
    quarter = turns.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    c, d = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    c = tl.where((quarter == 1) | (quarter == 2), -c, c)
    d = tl.where(quarter >= 2, -d, d)
    return c.to(angle.dtype), d.to(angle.dtype)


@triton.jit
def convolved(
    x, taps, state, dim, inside, channel, s_t, WIDE: tl.constexpr, TAPS: tl.constexpr,
    CONVOLVES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Channels `dim` of a head after convolution and SiLU; `channel` is that of the head's first."""
    value = tl.load(x + dim, mask=inside, other=0.0).to(WIDE)
    if CONVOLVES:
        own = channel + dim
        value *= tl.load(taps + own * TAPS + TAPS - 1, mask=inside, other=0.0).to(WIDE)
        for tap in tl.static_range(TAPS - 1):
            past = tl.load(state + tap * s_t + own, mask=inside, other=0.0).to(WIDE)
            value += past * tl.load(taps + own * TAPS + tap, mask=inside, other=0.0).to(WIDE)
    if SILU:
        value *= sigmoid(value)
    return value


@triton.jit
def one_head(
    x, y, weight, taps, state, after, position, frequency, number, sequence, x_n, x_h, s_n, s_t,
    channels, factor, WIDE: tl.constexpr, TAPS: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, REPEAT: tl.constexpr,
    CHANNEL: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """Writes one head: number `number` of the HEADS of a part.

    CHANNEL is the part's first channel in the convolution, -1 for none. NORM is 0 for none, 1 for
    unit length, 2 for an RMSNorm.
    """
    convolves: tl.constexpr = CHANNEL >= 0
    own, dim = number // REPEAT, tl.arange(0, WIDTH)
    inside = dim < DIM
    source, past = x + sequence * x_n + own * x_h, state + sequence * s_n
    channel = CHANNEL + own * DIM
    value = convolved(source, taps, past, dim, inside, channel, s_t, WIDE, TAPS, convolves, SILU)
    square = tl.sum(value * value, 0)
    if NORM == 1:
        length = tl.sqrt(square + EPS)
        scale = 1.0 / (tl.maximum(length, 1e-12) if EPS == 0 else length)
        value *= scale
    if NORM == 2:
        scale = 1.0 / tl.sqrt(square / DIM + EPS)
        value *= scale * tl.load(weight + dim, mask=inside, other=0.0).to(WIDE)
    if TURNS:
        # the other channel of each pair is computed anew, because another thread holds it
        turned, second = dim < 2 * PAIRS, (dim >= PAIRS) & (dim < 2 * PAIRS)
        other = tl.where(second, dim - PAIRS, dim + PAIRS)
        partner = convolved(
            source, taps, past, other, turned, channel, s_t, WIDE, TAPS, convolves, SILU
        )
        if NORM > 0:
            partner *= scale
        if NORM == 2:
            partner *= tl.load(weight + other, mask=turned, other=0.0).to(WIDE)
        pair = tl.where(second, dim - PAIRS, dim)
        place = tl.load(position + sequence).to(WIDE)
        angle = place * tl.load(frequency + pair, mask=turned, other=0.0).to(WIDE)
        cosine, sine = cos_and_sin(angle)
        sine = tl.where(second, sine, -sine) * factor
        value = tl.where(turned, value * (cosine * factor) + partner * sine, value)
    tl.store(y + (sequence * HEADS + number) * DIM + dim, value.to(y.dtype.element_ty), mask=inside)
    if convolves:
        # the inputs of the convolution move on by one; the first of the equal heads writes them
        first = inside & (number % REPEAT == 0)
        target = after + sequence * (TAPS - 1) * channels + channel + dim
        for tap in tl.static_range(TAPS - 1):
            if tap < TAPS - 2:
                moved = tl.load(past + (tap + 1) * s_t + channel + dim, mask=first, other=0.0)
            else:
                moved = tl.load(source + dim, mask=first, other=0.0)
            tl.store(target + tap * channels, moved, mask=first)


@triton.jit
def heads_kernel(
    x0, x1, x2, y0, y1, y2, weight0, weight1, weight2, taps, state, after, position, frequency,
    x0_n, x0_h, x1_n, x1_h, x2_n, x2_h, s_n, s_t, channels, factor, WIDE: tl.constexpr,
    TAPS: tl.constexpr, PAIRS: tl.constexpr,
    HEADS0: tl.constexpr, DIM0: tl.constexpr, WIDTH0: tl.constexpr, REPEAT0: tl.constexpr,
    CHANNEL0: tl.constexpr, SILU0: tl.constexpr, NORM0: tl.constexpr, EPS0: tl.constexpr,
    TURNS0: tl.constexpr,
    HEADS1: tl.constexpr, DIM1: tl.constexpr, WIDTH1: tl.constexpr, REPEAT1: tl.constexpr,
    CHANNEL1: tl.constexpr, SILU1: tl.constexpr, NORM1: tl.constexpr, EPS1: tl.constexpr,
    TURNS1: tl.constexpr,
    HEADS2: tl.constexpr, DIM2: tl.constexpr, WIDTH2: tl.constexpr, REPEAT2: tl.constexpr,
    CHANNEL2: tl.constexpr, SILU2: tl.constexpr, NORM2: tl.constexpr, EPS2: tl.constexpr,
    TURNS2: tl.constexpr,
):  # fmt: skip
    """Convolution, SiLU, norm and rotary positions of one head of one token.

    The heads of up to three parts stand one after the other; a part that is not there has 0 heads.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, number = program // (HEADS0 + HEADS1 + HEADS2), program % (HEADS0 + HEADS1 + HEADS2)
    if number < HEADS0:
        one_head(
            x0, y0, weight0, taps, state, after, position, frequency, number, sequence, x0_n, x0_h,
            s_n, s_t, channels, factor, WIDE, TAPS, PAIRS, HEADS0, DIM0, WIDTH0, REPEAT0, CHANNEL0,
            SILU0, NORM0, EPS0, TURNS0,
        )  # fmt: skip
    if HEADS1 > 0:  # noqa: SIM102 - known when the kernel is compiled
        if (number >= HEADS0) & (number < HEADS0 + HEADS1):
            one_head(
                x1, y1, weight1, taps, state, after, position, frequency, number - HEADS0, sequence,
                x1_n, x1_h, s_n, s_t, channels, factor, WIDE, TAPS, PAIRS, HEADS1, DIM1, WIDTH1,
                REPEAT1, CHANNEL1, SILU1, NORM1, EPS1, TURNS1,
            )  # fmt: skip
    if HEADS2 > 0:  # noqa: SIM102
        if number >= HEADS0 + HEADS1:
            one_head(
                x2, y2, weight2, taps, state, after, position, frequency, number - HEADS0 - HEADS1,
                sequence, x2_n, x2_h, s_n, s_t, channels, factor, WIDE, TAPS, PAIRS, HEADS2, DIM2,
                WIDTH2, REPEAT2, CHANNEL2, SILU2, NORM2, EPS2, TURNS2,
            )  # fmt: skip


@triton.jit
def decay_kernel(
    a, a_log, dt_bias, b, g, beta, entries, most, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Log decay and write strength of a block of tokens and heads."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, head = entry < entries, entry % HEADS
    kind = g.dtype.element_ty
    x = tl.load(a + entry, mask=inside, other=0.0).to(kind)
    x += tl.load(dt_bias + head, mask=inside, other=0.0).to(kind)
    # softplus(x) = max(x, 0) + log(1 + exp(-|x|)); where the exp is small, 1 + exp rounds it away
    small = tl.exp(-tl.abs(x))
    series = small * (1.0 - small * (0.5 - small / 3))
    more = tl.where(small < 1e-4, series, tl.log(1.0 + small))
    rate = tl.exp(tl.load(a_log + head, mask=inside, other=0.0).to(kind))
    tl.store(g + entry, -rate * (tl.maximum(x, 0.0) + more), mask=inside)
    logit = tl.load(b + entry, mask=inside, other=0.0).to(kind)
    tl.store(beta + entry, most * sigmoid(logit), mask=inside)


@triton.jit
def normed(read, weight, column, inside, WIDE: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr,
           NORM: tl.constexpr):  # fmt: skip
    """A read of one head, with its norm if it has one."""
    value = tl.load(read + column, mask=inside, other=0.0).to(WIDE)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / DIM + EPS)
        value *= scale * tl.load(weight + column, mask=inside, other=0.0).to(WIDE)
    return value


@triton.jit
def mix_kernel(
    first, second, weight1, weight2, logits, out, WIDE: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, EPS: tl.constexpr, NORM1: tl.constexpr, NORM2: tl.constexpr,
):  # fmt: skip
    """The gated sum of both reads of one head of one token."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    place = program * DIM
    one = normed(first + place, weight1, column, inside, WIDE, DIM, EPS, NORM1)
    two = normed(second + place, weight2, column, inside, WIDE, DIM, EPS, NORM2)
    one *= sigmoid(tl.load(logits + program * 2).to(WIDE))
    two *= sigmoid(tl.load(logits + program * 2 + 1).to(WIDE))
    tl.store(out + place + column, (one + two).to(out.dtype.element_ty), mask=inside)


def kind_of(x: Tensor) -> Any:
    """The dtype that a kernel computes in."""
    return tl.float64 if wide(x) == torch.float64 else tl.float32


@launches
def launch_heads(
    first: Tensor, parts: list[Heads], conv: Convolution | None, rotation: Rotation | None
) -> tuple[list[Tensor], Tensor | None]:
    """See `hamblocks_ops.decode.heads`; `first` is that of the first part."""
    sequences = first.shape[0]
    sizes: dict[str, Any] = {}
    given, made, weights, strides = [], [], [], []
    for index in range(PARTS):
        part = parts[index] if index < len(parts) else None
        x = first if part is None else part.x
        x = x if x.stride(3) == 1 else x.contiguous()
        count, dim = (0, 1) if part is None else (x.shape[2] * part.repeat, x.shape[3])
        y = first if part is None else x.new_empty(sequences, 1, count, dim)
        given.append(x)
        made.append(y)
        weights.append(None if part is None else part.weight)
        strides += [x.stride(0), x.stride(2)]
        part = part or Heads(first)
        norm = 1 if part.unit else 0 if part.weight is None else 2
        own = {
            "HEADS": count,
            "DIM": dim,
            "WIDTH": triton.next_power_of_2(dim),
            "REPEAT": part.repeat,
            "CHANNEL": -1 if part.channel is None else part.channel,
            "SILU": part.silu,
            "NORM": norm,
            "EPS": part.unit_eps if part.unit else part.eps,
            "TURNS": part.turns,
        }
        sizes |= {f"{name}{index}": value for name, value in own.items()}
    # any pointer will do where there is no convolution
    after, taps, state, s_n, s_t = None, None, first, 0, 0
    if conv is not None:
        state = conv.state if conv.state.stride(2) == 1 else conv.state.contiguous()
        taps, after = conv.weight.contiguous(), state.new_empty(state.shape)
        s_n, s_t = state.stride(0), state.stride(1)
    position, frequency, factor = None, None, 1.0
    if rotation is not None:
        _, frequency, factor = rotation
        # positions that are the same for all sequences may be one number in memory
        position = rotation.position.contiguous()
    programs = sequences * sum(sizes[f"HEADS{index}"] for index in range(PARTS))
    if programs:
        heads_kernel[(programs,)](
            *given, *made, *weights, taps, state, after, position, frequency, *strides, s_n, s_t,
            0 if after is None else state.shape[2], factor, WIDE=kind_of(first),
            TAPS=1 if taps is None else taps.shape[1],
            PAIRS=0 if frequency is None else frequency.shape[0], **sizes, num_warps=1,
        )  # fmt: skip
    return made[: len(parts)], after


@launches
def launch_decay(
    a: Tensor, a_log: Tensor, dt_bias: Tensor, b: Tensor, most: float
) -> tuple[Tensor, Tensor]:
    """See `hamblocks_ops.decode.decay_and_strength`."""
    g, beta = (a.new_empty(a.shape, dtype=wide(a)) for _ in range(2))
    if g.numel():
        decay_kernel[(triton.cdiv(g.numel(), 256),)](
            a.contiguous(), a_log, dt_bias, b.contiguous(), g, beta, g.numel(), most,
            HEADS=a.shape[-1], BLOCK=256,
        )  # fmt: skip
    return g, beta


@launches
def launch_mix(
    first: Tensor,
    second: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    logits: Tensor,
    eps: float,
) -> Tensor:
    """See `hamblocks_ops.decode.mix`."""
    count, dim = first.shape[0] * first.shape[2], first.shape[3]
    out = first.new_empty(first.shape[0], 1, first.shape[2] * dim)
    if count:
        mix_kernel[(count,)](
            first.contiguous(), second.contiguous(), *norms, logits.contiguous(), out,
            WIDE=kind_of(first), DIM=dim, WIDTH=triton.next_power_of_2(dim), EPS=eps,
            NORM1=norms[0] is not None, NORM2=norms[1] is not None, num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def compete_kernel(
    score, new, position, scores, until, ends, position_after, scores_after, slots, s_n, s_h, n_n,
    n_h, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new token of one sequence and head against its slots. `slots` are `[N, slots, HEADS]`.

    The slot that the new token removes is the first one while it is empty, else the worst one.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // HEADS, program % HEADS
    start = sequence * slots * HEADS + head
    here = tl.load(new + sequence * n_n + head * n_h)
    own = tl.load(score + sequence * s_n + head * s_h)
    first = tl.load(position + start)
    rank = tl.where(own != own, float("-inf"), own)
    worst, place = rank, 0 * here + slots  # the worst so far, and its slot; at first the new token
    for begin in range(0, slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < slots
        value = tl.load(scores + start + slot.to(tl.int64) * HEADS, mask=inside, other=float("inf"))
        value = tl.where(value != value, float("-inf"), value)
        value = tl.where(inside, value, float("inf"))
        least = tl.min(value, 0)
        # of equal scores the latest is the worst, and the new token is the latest of all
        last = tl.max(tl.where(inside & (value == least), slot, -1), 0)
        lower = (least < worst) | ((least == worst) & (place < slots))
        place = tl.where(lower, last, place)
        worst = tl.where(lower, least, worst)
    full, enters = first >= 0, here >= 0
    removed = tl.where(full, place, 0)
    stays = enters & (removed < slots)  # whether the new token is stored
    tl.store(until + sequence * HEADS + head, tl.where(stays, 2147483647, here))
    for begin in range(0, slots, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < slots
        at = start + slot.to(tl.int64) * HEADS
        held = tl.load(position + at, mask=inside, other=-1)
        end = tl.where(held < 0, held, 2147483647)
        tl.store(ends + at, tl.where(stays & full & (slot == removed), here, end), mask=inside)
        # slots after the removed one move up, and the new token takes the last
        moves = stays & (slot >= removed)
        last = moves & (slot == slots - 1)
        source = at + tl.where(moves & (last == 0), HEADS, 0)
        held = tl.load(position + source, mask=inside, other=-1)
        value = tl.load(scores + source, mask=inside, other=0.0)
        tl.store(position_after + at, tl.where(last, here, held), mask=inside)
        tl.store(scores_after + at, tl.where(last, own, value), mask=inside)


@launches
def launch_compete(
    score: Tensor, new: Tensor, position: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `hamblocks_ops.decode.compete`."""
    sequences, slots, heads = position.shape
    position, scores = position.contiguous(), scores.contiguous()
    until, ends = position.new_empty(sequences, 1, heads), position.new_empty(position.shape)
    after = position.new_empty(position.shape), scores.new_empty(scores.shape)
    if until.numel():
        block = min(COMPETING, triton.next_power_of_2(slots))
        compete_kernel[(sequences * heads,)](
            score, new, position, scores, until, ends, *after, slots, score.stride(0),
            score.stride(2), new.stride(0), new.stride(2), HEADS=heads, BLOCK=block,
        )  # fmt: skip
    return until, ends, *after
