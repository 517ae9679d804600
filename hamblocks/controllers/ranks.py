"""Counts and samples over all ranks of the default process group."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.controllers.drawn import drawn


def over_ranks(counts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sums counts over the ranks, and merges their samples into one.

    Without a process group both are returned as they are. Every rank gets the same numbers, bit for
    bit: those that a single process with the scores of all ranks would have.

    Args:
        counts: int64 `[n]`.
        keys: int64 `[size]`, a sample of the scores that this rank saw (see `drawn`).

    Returns:
        The sums, int64 `[n]`, and the sample of all scores, int64 `[size]`.

    Raises:
        RuntimeError: a rank ended, or did not call this within the timeout of the process group.
            With NCCL it is the watchdog of torch that ends the process then.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts, keys
    counts = counts.clone()
    every = [torch.empty_like(keys) for _ in range(torch.distributed.get_world_size())]
    try:
        torch.distributed.all_reduce(counts)
        torch.distributed.all_gather(every, keys)
    except RuntimeError as error:
        raise RuntimeError(
            f"step_controllers: expected a call on each of the {len(every)} ranks of the default "
            "process group, with the model in training mode, got none from another rank within the "
            f"timeout of the group, or that rank has ended ({error})"
        ) from error
    return counts, drawn(torch.cat(every), len(keys))
