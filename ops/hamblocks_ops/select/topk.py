"""Streaming top-k lifetimes in O(T log T), without a loop over tokens or a wait for the device.

Let theta_t be the k-th best token seen by time t, in the total order (larger score, then earlier).
It only ever improves, so token j leaves at the first t with theta_t better than j: one binary
search, once theta is known. theta_t is the k-th smallest rank within a prefix, which a wavelet
matrix over the ranks answers for all t at once, a bit of the rank at a time (Claude, Navarro and
Ordonez, *The wavelet matrix*, 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks_ops.lengths import is_symbolic
from hamblocks_ops.packing import NEVER

CACHED_RANKS = 2**16
"""Ranks that a CPU searches at a time. A level gathers from all over its tables, so with more of
them the time grows faster than T log T, by misses of the cache."""


def topk(score: Tensor, k: int, position: Tensor, sequence: Tensor | None) -> Tensor:
    """Shapes as in `reference.topk`; returns int64 like `position`."""
    batch, tokens, heads = score.shape
    if tokens == 0 or k == 0:
        return position.clone()
    # independent rankings side by side: [B * H, T]
    rank = ranks(score, position).transpose(1, 2).reshape(-1, tokens).contiguous()
    index = torch.arange(tokens, device=score.device)
    start = torch.zeros_like(index) if sequence is None else torch.searchsorted(sequence, sequence)
    low, high = start.expand_as(rank), (index + 1).expand_as(rank)
    worst = kth_smallest(rank, low, high, torch.full_like(rank, k - 1))
    # fewer than k tokens seen: nothing is beaten yet
    worst = torch.where(index - start + 1 >= k, worst, tokens)
    # strength of theta_t, and of a token: tokens - rank. Token j leaves at the first t whose
    # strength is larger.
    strength = tokens - worst  # never descends within a sequence
    # one search serves all packed sequences: each gets a range of numbers of its own
    lane = torch.zeros_like(index) if sequence is None else sequence * (tokens + 1)
    lost = torch.searchsorted(
        (lane + strength).contiguous(), (lane + tokens - rank).contiguous(), right=True
    )
    # a token cannot leave before it comes, and theta of another sequence says nothing about it
    lost = torch.maximum(lost, index)
    inside = (lost < tokens) & ((start[lost.clamp(max=tokens - 1)]) == start)
    lost = lost.view(batch, heads, tokens).transpose(1, 2)
    inside = inside.view(batch, heads, tokens).transpose(1, 2)
    when = torch.where(inside, position.gather(1, lost.clamp(max=tokens - 1)), NEVER)
    return torch.where(position < 0, position, when)


def ranks(score: Tensor, position: Tensor) -> Tensor:
    """Rank of every token in its ranking, 0 the best; ties to the earlier token, padding last."""
    score = score.masked_fill(score.isnan(), float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(
        1, (position < 0).to(torch.int8).gather(1, order).argsort(dim=1, stable=True)
    )
    ranks = torch.arange(score.shape[1], device=score.device)[None, :, None].expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def kth_smallest(rank: Tensor, low: Tensor, high: Tensor, wanted: Tensor) -> Tensor:
    """Order statistics of ranges of a permutation, each in O(log T).

    Args:
        rank: int64 `[R, T]`, a permutation of 0 ... T - 1 in every row.
        low: int64 `[R, Q]`, the first column of each range.
        high: int64 `[R, Q]`, the column after the last one.
        wanted: int64 `[R, Q]`, which of the ranks in the range, 0 the smallest.

    Returns:
        int64 `[R, Q]`: `rank[low:high].sort()[wanted]`; undefined where the range is too short.
    """
    if is_symbolic(rank.shape[1]):
        found: Tensor = _kth_smallest_op(rank, low, high, wanted)
        return found
    rows = max(1, CACHED_RANKS // max(rank.shape[1], 1))
    # a trace would repeat the ops for every block
    if rank.device.type != "cpu" or rank.shape[0] <= rows or torch.compiler.is_compiling():
        return _kth_smallest(rank, low, high, wanted)
    blocks = zip(*(x.split(rows) for x in (rank, low, high, wanted)), strict=True)
    return torch.cat([_kth_smallest(*block) for block in blocks])


def _kth_smallest(rank: Tensor, low: Tensor, high: Tensor, wanted: Tensor) -> Tensor:
    tokens = rank.shape[1]
    found = torch.zeros_like(low)
    level = rank
    # one level per bit of the rank, the highest first; a level sorts tokens stably by that bit. low
    # and high bound the range of each prefix within the level: it holds the ranks that agree with
    # `found` so far.
    for bit in reversed(range(max(tokens - 1, 1).bit_length())):
        one = (level >> bit) & 1
        zeros_before = torch.nn.functional.pad((1 - one).cumsum(1), [1, 0])
        zeros = zeros_before[:, -1:]
        low_zero, high_zero = zeros_before.gather(1, low), zeros_before.gather(1, high)
        # if the zeros of the range are too few, the wanted rank has a one here, behind all of them
        right = wanted >= high_zero - low_zero
        wanted = torch.where(right, wanted - (high_zero - low_zero), wanted)
        low = torch.where(right, zeros + low - low_zero, low_zero)
        high = torch.where(right, zeros + high - high_zero, high_zero)
        found = found | (right.long() << bit)
        place = torch.arange(tokens, device=rank.device).expand_as(rank)
        place = torch.where(one == 1, zeros + place - zeros_before[:, :-1], zeros_before[:, :-1])
        level = torch.empty_like(level).scatter_(1, place, level)
    return found


@torch.library.custom_op("hamblocks::kth_smallest", mutates_args=())
def _kth_smallest_op(rank: Tensor, low: Tensor, high: Tensor, wanted: Tensor) -> Tensor:
    """`kth_smallest` as one operator, where a loop over the bits of T cannot be unrolled."""
    return _kth_smallest(rank, low, high, wanted)


@_kth_smallest_op.register_fake
def _(_rank: Tensor, low: Tensor, _high: Tensor, _wanted: Tensor) -> Tensor:
    return low.new_empty(low.shape)
