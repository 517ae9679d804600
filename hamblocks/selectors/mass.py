"""The loop of `ErrorMass`: which token leaves when, one token after the other.

Which tokens are stored decides which leave next, so the tokens of a sequence cannot be decided side
by side; streams (a sequence and head) can. The loop is one operator, because `torch.compile` would
unroll it. It launches a fixed number of kernels per token and waits for none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        stored_sum: float64 `[R, L]`, sums of the stored scores down to each of these tokens.
        total: float64 `[R, 1]`, the sum of all scores before these.
        share: of the sum of all scores.
        capacity: the most tokens that are stored.

    Returns:
        The token at which each one leaves, int64 `[R, L + T]`: an index of `score`, T if it stays.
        The sums of the stored scores down to each token that stays, float64 `[R, L + T]`. The sum
        of all scores, float64 `[R, 1]`.
    """
    streams, tokens = score.shape
    slots = stored.shape[1]
    every = slots + tokens
    width = min(capacity, every)
    # The stored tokens from the best to the worst, with a column more for the one that comes. An
    # empty column has the score -1 and the index `every`, a column of the results for nothing.
    place = torch.arange(width + 1, device=score.device)
    value, order = stored.sort(dim=1, descending=True, stable=True)
    value, order = value[:, :width], order[:, :width]
    down, index = stored_sum.gather(1, order), order.masked_fill(value < 0, every)
    more = [0, width + 1 - value.shape[1]]
    value = torch.nn.functional.pad(value, more, value=-1.0)
    down = torch.nn.functional.pad(down, more)
    index = torch.nn.functional.pad(index, more, value=every)
    leaves = torch.full((streams, every + 1), tokens, device=score.device)
    total = total.clone()
    for t in range(tokens):
        if first is not None:  # an empty list, for the tokens of another sequence
            value = value.masked_fill(first[t], -1.0)
            index = index.masked_fill(first[t], every)
            total = total.masked_fill(first[t], 0.0)
        new = score[:, t : t + 1]
        gain = new.clamp(min=0)
        # Those from the place of the new token on move one column down. Their sums grow by its
        # score. Sums are taken in this order alone, so pieces give the same bits as one pass.
        stays = value >= new
        above = torch.nn.functional.pad(stays[:, :-1], [1, 0], value=True)
        enters = above & ~stays
        moved_down = torch.nn.functional.pad(down[:, :-1], [1, 0]) + gain
        moved_value = torch.nn.functional.pad(value[:, :-1], [1, 0])
        moved_index = torch.nn.functional.pad(index[:, :-1], [1, 0])
        down = torch.where(stays, down, moved_down)
        value = torch.where(stays, value, torch.where(enters, new, moved_value))
        index = torch.where(stays, index, torch.where(enters, slots + t, moved_index))
        total = total + gain
        # A token is needed if the better ones do not reach the share.
        better = torch.nn.functional.pad(down[:, :-1], [1, 0])
        needed = (better < share * total) & (place < width) & (value > 0)
        leaves.scatter_(1, index.masked_fill(needed, every), t)
        value = torch.where(needed, value, -1.0)
        index = torch.where(needed, index, every)
    sums = score.new_zeros(streams, every + 1).scatter_(1, index, down)
    return leaves[:, :every].clone(), sums[:, :every].clone(), total


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
    return leaves, score.new_empty(shape), torch.empty_like(total)
