"""The stored keys of a call and what attention visits of them, made by five launches at the most.

Lists, copies and plans are made once, in the forward pass, and kept for the backward pass. Nothing
waits for the device: lists have the largest length that the shapes allow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.selected_attention.call import AttentionCall
from hamblocks_ops.selected_attention.triton.keys import copy_kernel, dense, padded_dim
from hamblocks_ops.selected_attention.triton.listing import CLASSES, count_kernel, write_kernel
from hamblocks_ops.selected_attention.triton.moments import shift_kernel, span_kernel
from hamblocks_ops.selected_attention.triton.plan import FIELDS, KEY_FIELDS, TOGETHER, plan_kernel
from hamblocks_ops.selected_attention.triton.sizes import Config

TOKENS = 256
"""Tokens of a program that counts or writes."""
COUNTS = 32
"""Counts that `write_kernel` sums at a time."""
WARPS = 8
"""Warps of `write_kernel` and `plan_kernel`; with four they spill registers somewhere."""
MOMENTS = 1024
"""Tokens, or sequences, that `span_kernel` and `shift_kernel` look at at a time."""


class Sizes(NamedTuple):
    """Sizes of the lists of a call.

    Attributes:
        streams: R = B * Hkv.
        slots: of a list. One block more than the tokens fill: each part may end with a block that is
            not full.
        unit: slots of a unit, of which every block of keys is a multiple.
        plans: entries of the plans of forward, gradient of q, and gradients of k and v.
    """

    streams: int
    slots: int
    unit: int
    plans: tuple[int, int, int]

    @staticmethod
    def of(q: Tensor, k: Tensor, configs: tuple[Config, Config, Config], *, keep: bool) -> Sizes:
        """Sizes for a call; with `keep` for a backward pass too."""
        used = configs if keep else configs[:1]
        largest, streams = max(one.keys for one in used), k.shape[0] * k.shape[2]
        slots = blocks(k.shape[1], largest) * largest + largest
        forward, of_queries = (
            streams * blocks(q.shape[1], one.queries) * FIELDS.value for one in configs[:2]
        )
        of_keys = streams * blocks(slots, configs[2].keys) * KEY_FIELDS.value
        plans = (forward, of_queries, of_keys) if keep else (forward, 0, 0)
        return Sizes(streams, slots, min(one.keys for one in used), plans)

    def split(self, plans: Tensor) -> tuple[Tensor, ...]:
        """The plans of forward, gradient of q, and gradients of k and v."""
        return torch.split(plans, list(self.plans))


class StoredKeys(NamedTuple):
    """Stored keys, side by side.

    Attributes:
        k: `[R, slots, D]`.
        v: `[R, slots, D]`.
        bias: float32 `[R, slots]`, in base 2; empty without a bias.
        times: int32 `[3, R, slots]`: token, position and evict_at of every slot (see `listing`).
        asked: int32 `[B, Tq]`, the time of each query.
        plans: int32, the plans of forward, gradient of q, and gradients of k and v, one behind the
            other (see `plan`).
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    times: Tensor
    asked: Tensor
    plans: Tensor

    @staticmethod
    def empty(q: Tensor, k: Tensor, logit_bias: Tensor | None, sizes: Sizes) -> StoredKeys:
        """Uninitialised."""
        streams, slots = sizes.streams, sizes.slots
        bias = (streams, slots) if logit_bias is not None else (0,)
        return StoredKeys(
            k.new_empty(streams, slots, k.shape[3]),
            k.new_empty(streams, slots, k.shape[3]),
            k.new_empty(bias, dtype=torch.float32),
            k.new_empty(3, streams, slots, dtype=torch.int32),
            q.new_empty(q.shape[:2], dtype=torch.int32),
            k.new_empty(sum(sizes.plans), dtype=torch.int32),
        )

    @staticmethod
    def none(q: Tensor) -> StoredKeys:
        """Of a call without a backward pass, which keeps nothing."""
        k, v, bias = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
        return StoredKeys(k, v, bias, *(q.new_empty(0, dtype=torch.int32) for _ in range(3)))

    def parts(self) -> tuple[Tensor, ...]:
        """The lists, in the order of the kernels' arguments."""
        return self.k, self.v, self.bias, self.times[1], self.times[2]


def store_keys(
    call: AttentionCall, configs: tuple[Config, Config, Config], *, keep: bool
) -> StoredKeys:
    """Lists, copies and plans for a call; with `keep` the plans of the backward kernels too."""
    sizes = Sizes.of(call.q, call.k, configs, keep=keep)
    stored = StoredKeys.empty(call.q, call.k, call.logit_bias, sizes)
    classes = _list(
        call, stored, sizes, max(one.keys for one in (configs if keep else configs[:1]))
    )
    extremes = _copy(call, stored, sizes)
    forward, of_queries, of_keys = configs
    queries, units = call.q.shape[1], sizes.slots // sizes.unit
    programs = blocks(blocks(queries, forward.queries), TOGETHER.value) * sizes.streams
    if keep:
        programs += blocks(blocks(queries, of_queries.queries), TOGETHER.value) * sizes.streams
        programs += blocks(sizes.slots // of_keys.keys, TOGETHER.value) * sizes.streams
    plan_kernel[(programs,)](
        stored.asked, classes, extremes, *sizes.split(stored.plans), queries, sizes.streams,
        units, HEADS=call.k.shape[2], UNIT=sizes.unit, M=forward.queries, N=forward.keys,
        QM=of_queries.queries, QN=of_queries.keys, KM=of_keys.queries, KN=of_keys.keys, KEEP=keep,
        num_warps=WARPS,
    )  # fmt: skip
    return stored


def _list(call: AttentionCall, stored: StoredKeys, sizes: Sizes, align: int) -> Tensor:
    """Writes times and queries; returns the classes of every list, int32 `[R, 2, CLASSES]`."""
    (batch, tokens, heads), queries = call.evict_at.shape, call.q.shape[1]
    packed = call.cu_seqlens is not None
    sequences = call.cu_seqlens.shape[0] - 1 if call.cu_seqlens is not None else batch
    # any pointer will do where there are no borders
    borders = call.evict_at if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    spans, shifts = borders.new_empty(3, sequences, dtype=torch.int64).split([2, 1])
    asks, begins, ends = call.query_position, call.key_position, call.evict_at
    # the same for all heads: one is enough
    seen = 1 if begins.stride(2) == 0 else heads
    span_kernel[(sequences,)](
        asks, begins, borders, spans, *asks.stride(), *begins.stride()[1:], queries, seen,
        sequences, BLOCK=MOMENTS, PACKED=packed,
    )  # fmt: skip
    if packed:
        shift_kernel[(1,)](spans, shifts, sequences, BLOCK=MOMENTS)
    given = begins, ends, borders, spans, shifts
    strides = *begins.stride(), *ends.stride()
    per_stream, programs = blocks(tokens, TOKENS), blocks(sizes.slots, TOKENS)
    counts = call.q.new_empty(sizes.streams, per_stream, CLASSES.value, dtype=torch.int32)
    classes = call.q.new_empty(sizes.streams, 2, CLASSES.value, dtype=torch.int32)
    constants = {"HEADS": heads, "TOKENS": TOKENS, "PACKED": packed}
    steps = sequences.bit_length()
    count_kernel[(batch * blocks(queries, TOKENS) + sizes.streams * per_stream,)](
        asks, *given, stored.asked, counts, *asks.stride(), *strides, queries, tokens, sequences,
        steps, batch, per_stream, **constants,
    )  # fmt: skip
    write_kernel[(sizes.streams * programs,)](
        *given, counts, stored.times, classes, *strides, tokens, sequences, steps, per_stream, programs,
        sizes.slots, **constants, COUNTS=COUNTS, ALIGN=align, num_warps=WARPS,
    )  # fmt: skip
    return classes


def _copy(call: AttentionCall, stored: StoredKeys, sizes: Sizes) -> Tensor:
    """Copies the listed keys; returns the extremes of every unit, int32 `[4, R, units]`."""
    units = sizes.slots // sizes.unit
    extremes = call.q.new_empty(4, sizes.streams, units, dtype=torch.int32)
    k, v = dense(call.k), dense(call.v)
    # any pointer will do where there is no bias
    bias = call.evict_at if call.logit_bias is None else call.logit_bias
    copy_kernel[(sizes.streams * units,)](
        k, v, bias, stored.times, stored.k, stored.v, stored.bias, extremes, *k.stride()[:3],
        *v.stride()[:3], *bias.stride(), sizes.slots, units, sizes.streams, HEADS=k.shape[2],
        DIM=k.shape[3], WIDTH=padded_dim(k.shape[3]), UNIT=sizes.unit,
        HAS_BIAS=call.logit_bias is not None,
    )  # fmt: skip
    return extremes


def blocks(x: int, size: int) -> int:
    """How many blocks of `size` x things fill."""
    return -(-x // size)
