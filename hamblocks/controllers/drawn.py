"""A sample of scores that does not depend on how the scores are split over calls and ranks.

Every score gets a key: a hash of its value and its place in the sequence, and below it the score
itself. The sample is the scores of the smallest keys. So the sample of all scores is made of the
samples of their parts, in any order and on any number of ranks (bottom-k sampling, Cohen and Kaplan
2007), and equal scores at different places have different keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.hashing import mix

NO_SCORE = 2**63 - 1
"""Key of an empty entry, larger than the key of any score."""
_BITS = 0xFFFFFFFF


def keys_of(score: Tensor, rank: int = 0, ranks: int = 1) -> Tensor:
    """Keys of scores.

    Args:
        score: floating `[B, T, H]`, rounded to float32; NaN stands for no score.
        rank: where ranks share the heads of a layer, this rank: its heads begin at `rank * H`.
        ranks: the number of these ranks; the layer has `ranks * H` heads.

    Returns:
        int64 `[B * T * H]`: 31 bits of the hash, then the 32 bits of the score.
    """
    _, tokens, heads = score.shape
    place = torch.arange(tokens * heads * ranks, device=score.device)
    place = place.view(tokens, ranks, heads)[:, rank]
    bits = score.detach().float().contiguous().view(torch.int32).long() & _BITS
    keys = (mix(bits ^ mix(place)) >> 1) << 32 | bits
    return keys.masked_fill(score.isnan(), NO_SCORE).flatten()


def drawn(keys: Tensor, size: int) -> Tensor:
    """The smallest keys, int64 `[size]`; `NO_SCORE` where there are fewer."""
    if keys.numel() < size:
        keys = torch.cat([keys, keys.new_full((size - keys.numel(),), NO_SCORE)])
    return keys.topk(size, largest=False).values


def scores_of(keys: Tensor) -> Tensor:
    """The scores of a sample, spread over its whole size.

    Args:
        keys: int64 `[size]`, from `drawn`.

    Returns:
        float32 `[size]`, ascending. Fewer scores repeat, equally often give or take one.
        NaN if there is none.
    """
    size = len(keys)
    there = keys != NO_SCORE
    # back to the 32 bits of a float
    bits = torch.where(keys & _BITS >= 2**31, (keys & _BITS) - 2**32, keys & _BITS)
    scores = bits.to(torch.int32).view(torch.float32).masked_fill(~there, torch.nan)
    ascending = scores.sort().values  # NaN last
    index = (2 * torch.arange(size, device=keys.device) + 1) * there.sum() // (2 * size)
    return ascending[index]
