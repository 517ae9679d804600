"""The state of a linear recurrence before every chunk, by a scan over chunks.

A chunk changes the state by S -> C S + W. All ranks compute C and W of their chunks at the same
time, exchange them once, and combine those before each of their chunks. What is exchanged is
Dk (Dk + Dv) numbers per chunk, head and batch row, however long the chunks are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.parallel.channel import Channel
from hamblocks.parallel.shard import ContextShard
from hamblocks.slices import Transition


def states_before(
    channel: Channel, shard: ContextShard, transitions: list[Transition]
) -> list[Tensor]:
    """The state before every chunk of this rank.

    Args:
        channel: the channel of the call.
        shard: which tokens this rank holds.
        transitions: for every chunk of this rank, what the tokens of its last sequence do to the
            state. It does not count where that sequence ends with the chunk.

    Returns:
        `[B, H, Dk, Dv]` for every chunk of this rank; 0 where it begins a sequence.
    """
    keys = transitions[0].carry.shape[-1]
    every = channel.gather(torch.stack([torch.cat(one, -1) for one in transitions]))
    before = torch.zeros_like(transitions[0].write)
    states = {}
    for chunk in shard.chunks:
        if shard.owner(chunk.number) == shard.rank:
            states[chunk.number] = before
        if not chunk.goes_on:
            before = torch.zeros_like(before)
            continue
        both = every[shard.owner(chunk.number)][shard.slot(chunk.number)]
        carry, write = both[..., :keys], both[..., keys:]
        # a sequence that begins in the chunk begins with an empty state
        before = carry @ before + write if chunk.last == chunk.begin else write
    return [states[chunk.number] for chunk in shard.own]
