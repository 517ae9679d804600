"""The loop of `ErrorMass`: which token leaves when, one token after the other.

Which tokens are stored decides which leave next, so the tokens of a sequence cannot be decided side
by side; streams (a sequence and head) can. The worst stored token leaves first, so a stream needs
only the sum S of its stored scores: the worst one, x, is not needed if S - x reaches the share.

On a CPU every stream has a heap of its stored tokens on the host, O(log capacity) per token. On
other devices a loop of tensor ops decides all streams together, O(capacity) per token; it launches
a fixed number of kernels per token and waits for none of them. Both add and subtract the same
numbers in the same order.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor
from torch.nn.functional import pad


@torch.library.custom_op("hamblocks::error_mass", mutates_args=())
def error_mass(
    score: Tensor,
    first: Tensor | None,
    stored: Tensor,
    stored_sum: Tensor,
    total: Tensor,
    share: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds tokens one by one, and drops what is not needed for the share of the sum.

    Args:
        score: float64 `[R, T]`, finite and >= 0; -1 for padding.
        first: bool `[T]`, the first tokens of packed sequences; None if they are not packed.
        stored: float64 `[R, L]`, scores of the tokens that are stored, in the order in which they
            came; -1 for empty slots.
        stored_sum: float64 `[R, 1]`, the sum of the stored scores.
        total: float64 `[R, 1]`, the sum of all scores before these.
        share: of the sum of all scores.
        capacity: the most tokens that are stored.

    Returns:
        The token at which each one leaves, int64 `[R, L + T]`: an index of `score`, T if it stays.
        The sum of the stored scores and that of all scores, float64 `[R, 1]` each.
    """
    decide = by_heap if score.device.type == "cpu" else by_columns
    return decide(score, first, stored, stored_sum, total, share, capacity)


def by_heap(
    score: Tensor,
    first: Tensor | None,
    stored: Tensor,
    stored_sum: Tensor,
    total: Tensor,
    share: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`error_mass` on the host, stream by stream."""
    begins = [False] * score.shape[1] if first is None else first.tolist()
    streams = zip(
        score.tolist(),
        stored.tolist(),
        stored_sum.flatten().tolist(),
        total.flatten().tolist(),
        strict=True,
    )
    decided = [_one_stream(*stream, begins, share, capacity) for stream in streams]
    shape = score.shape[0], stored.shape[1] + score.shape[1]
    leaves = score.new_tensor([one[0] for one in decided], dtype=torch.int64).view(shape)
    sums = score.new_tensor([one[1:] for one in decided]).view(-1, 2)
    return leaves, sums[:, :1].clone(), sums[:, 1:].clone()


def _one_stream(
    score: list[float],
    stored: list[float],
    held: float,
    total: float,
    begins: list[bool],
    share: float,
    capacity: int,
) -> tuple[list[int], float, float]:
    """When each token leaves, and the sums of the stored scores and of all scores."""
    slots = len(stored)
    leaves = [len(score)] * (slots + len(score))
    # the worst token first: the smallest score, and of equal scores the one that came last
    heap = [(value, -index) for index, value in enumerate(stored) if value > 0]
    heapq.heapify(heap)
    for t, value in enumerate(score):
        if begins[t]:
            heap, held, total = [], 0.0, 0.0
        if value > 0:
            heapq.heappush(heap, (value, -(slots + t)))
            held, total = held + value, total + value
        elif value == 0:  # never stored
            leaves[slots + t] = t
        least = share * total
        while heap and (len(heap) > capacity or held - heap[0][0] >= least):
            worst, index = heapq.heappop(heap)
            leaves[-index] = t
            held -= worst
    return leaves, held, total


def by_columns(
    score: Tensor,
    first: Tensor | None,
    stored: Tensor,
    stored_sum: Tensor,
    total: Tensor,
    share: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`error_mass` for all streams together, on any device."""
    streams, tokens = score.shape
    slots = stored.shape[1]
    every = slots + tokens
    width = min(capacity, every)
    # The stored tokens from the best to the worst, with a column more for the one that comes. An
    # empty column has the score -1 and the index `every`, a column of the results for nothing.
    place = torch.arange(width + 1, device=score.device)
    value, order = stored.sort(dim=1, descending=True, stable=True)
    value, order = value[:, :width], order[:, :width]
    index = order.masked_fill(value <= 0, every)
    more = [0, width + 1 - value.shape[1]]
    value = pad(value, more, value=-1.0)
    index = pad(index, more, value=every)
    leaves = torch.full((streams, every + 1), tokens, device=score.device)
    held, total = stored_sum, total.clone()
    for t in range(tokens):
        if first is not None:  # an empty list, for the tokens of another sequence
            value = value.masked_fill(first[t], -1.0)
            index = index.masked_fill(first[t], every)
            held, total = held.masked_fill(first[t], 0.0), total.masked_fill(first[t], 0.0)
        new = score[:, t : t + 1]
        gain = new.clamp(min=0)
        # those from the place of the new token on move one column down
        stays = value >= new
        enters = pad(stays[:, :-1], [1, 0], value=True) & ~stays
        moved_value, moved_index = pad(value[:, :-1], [1, 0]), pad(index[:, :-1], [1, 0])
        value = torch.where(stays, value, torch.where(enters, new, moved_value))
        index = torch.where(stays, index, torch.where(enters, slots + t, moved_index))
        held, total = held + gain, total + gain
        # The sums without the last columns, one column after the other. A token is needed if the
        # better ones do not reach the share.
        sums = torch.cat([held, -value.clamp(min=0).flip(1)], 1).cumsum(1).flip(1)
        better, down = sums[:, :-1], sums[:, 1:]
        needed = (better < share * total) & (place < width) & (value > 0)
        leaves.scatter_(1, index.masked_fill(needed, every), t)
        value = torch.where(needed, value, -1.0)
        index = torch.where(needed, index, every)
        # the sum down to the last token that is needed
        last = needed.sum(1, keepdim=True) - 1
        held = down.gather(1, last.clamp(min=0)).where(last >= 0, better[:, :1])
    return leaves[:, :every].clone(), held.clone(), total


@error_mass.register_fake
def _(
    score: Tensor,
    first: Tensor | None,
    stored: Tensor,
    stored_sum: Tensor,
    total: Tensor,
    share: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = score.shape[0], stored.shape[1] + score.shape[1]
    leaves = score.new_empty(shape, dtype=torch.int64)
    return leaves, torch.empty_like(total), torch.empty_like(total)
