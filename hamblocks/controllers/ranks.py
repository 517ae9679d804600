"""Counts and samples over all ranks of the default process group."""

from __future__ import annotations

import torch
from torch import Tensor


def over_ranks(counts: Tensor, sample: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums counts over the ranks and draws one sample from those of all ranks.

    Without a process group both are those of the caller. Every rank gets the same numbers, bit for
    bit.

    Args:
        counts: int64 `[n]`.
        sample: float32 `[size]`, evenly drawn from the scores that this rank saw.
        weight: int64 `[]`, how many scores this rank saw; with 0 the sample is ignored.

    Returns:
        The sums, int64 `[n]`, and an ascending sample, float32 `[size]`, in which every rank has a
        share that is its share of the scores.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts, sample.sort().values
    size, ranks = len(sample), torch.distributed.get_world_size()
    counts = counts.clone()
    torch.distributed.all_reduce(counts)
    samples = [torch.empty_like(sample) for _ in range(ranks)]
    torch.distributed.all_gather(samples, sample)
    weights = [torch.empty_like(weight) for _ in range(ranks)]
    torch.distributed.all_gather(weights, weight)
    values, order = torch.cat(samples).sort(stable=True)
    mass = torch.stack(weights).repeat_interleave(size, output_size=ranks * size)[order].cumsum(0)
    # the middles of `size` equal shares of the mass, in integers: 2 i + 1 of 2 size parts
    middle = (2 * torch.arange(size, device=mass.device) + 1) * mass[-1]
    place = torch.searchsorted(2 * size * mass, middle).clamp(max=len(values) - 1)
    return counts, values[place]
