"""Context parallel: exchanges the inputs of short convolutions just before each chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.parallel.channel import Channel
from hamblocks.parallel.shard import ContextShard


def borders(channel: Channel, shard: ContextShard, inputs: list[Tensor], size: int) -> list[Tensor]:
    """The `size` inputs before every chunk of this rank; 0 before the beginning of a sequence.

    Every rank sends the last `size` inputs of its chunks, whatever the length of a sequence.

    Args:
        channel: the channel of the call.
        shard: which tokens this rank holds.
        inputs: `[B, T, channels]` of every chunk of this rank.
        size: number of inputs.

    Returns:
        `[B, size, channels]` for every chunk of this rank, oldest first.
    """
    padded = [torch.cat([x.new_zeros(x.shape[0], size, x.shape[2]), x], 1) for x in inputs]
    last = torch.stack([x[:, x.shape[1] - size :] for x in padded])
    if size == 0:
        return list(last.unbind())
    every = channel.gather(last)
    zero = torch.zeros_like(last[0, :, 0])

    def at(place: int) -> Tensor:
        """The input of a token of another chunk, which is among the last of that chunk."""
        chunk = shard.at(place)
        return every[shard.owner(chunk.number)][shard.slot(chunk.number)][:, place - chunk.end]

    result = []
    for chunk in shard.own:
        start = shard.sequence_start(chunk.begin) if chunk.continues else chunk.begin
        places = range(chunk.begin - size, chunk.begin)
        result.append(torch.stack([at(p) if p >= start else zero for p in places], 1))
    return result
