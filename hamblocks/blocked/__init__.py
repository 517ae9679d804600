"""Computations per token on a CPU, in blocks of tokens that fit the CPU's cache.

PyTorch computes such a formula one op at a time, and every op reads and writes all tokens. From a
few hundred tokens on they no longer fit the CPU's cache, and every op waits for main memory. In
blocks, all ops of the formula run on tokens that are in the cache. The backward passes are written
by hand in the same way, and save only the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hamblocks_ops.dispatch import transformed

BLOCK = 1 << 17
"""Elements of a block: 512 KB in float32, so that the few tensors of a formula fit the cache."""


def runs(x: Tensor, *more: Tensor) -> bool:
    """Whether a formula of x `[B, T, ...]` and other tensors is computed in blocks.

    True for plain tensors on a CPU, all float32 or all float64. False for narrower ones, whose ops
    round in between, and under `torch.compile` and the transforms of `torch.func`: they get plain
    ops. A single token is faster with plain ops, so callers ask only where T > 1.
    """
    tensors = x, *more
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(type(one) in (Tensor, nn.Parameter) for one in tensors)
        and all(one.device == x.device and one.dtype == x.dtype for one in more)
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def rows_of(x: Tensor) -> Iterator[slice]:
    """Groups of batch rows of x `[B, T, ...]` that fill a block; at least one row each."""
    together = max(1, BLOCK // max(1, x[:1].numel()))
    for row in range(0, x.shape[0], together):
        yield slice(row, min(row + together, x.shape[0]))


def spans_of(x: Tensor) -> list[slice]:
    """Runs of tokens of x `[B, T, ...]` that fill a block, in order; at least one token each."""
    size = max(1, BLOCK // max(1, x[:, :1].numel()))
    return [slice(at, min(at + size, x.shape[1])) for at in range(0, x.shape[1], size)]
