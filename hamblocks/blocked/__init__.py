"""Arithmetic per token on a CPU, in blocks of tokens that fit the cache.

Torch takes such a formula op by op, and every op passes over all tokens: from some hundred tokens
on, each pass goes to the main memory. In blocks, the passes of a formula find their tokens in the
cache. The gradients are written out in the same way, and keep nothing but the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hamblocks_ops.dispatch import transformed

BLOCK = 1 << 17
"""Numbers of a block: 512 KB in float32, so that the few blocks of a formula fit the cache."""


def runs(x: Tensor, *more: Tensor) -> bool:
    """Whether x `[B, T, ...]` is taken in blocks, and other tensors with it.

    They are plain tensors on a CPU, of one floating dtype. What looks through a function, a compiler
    or a transform of `torch.func`, gets plain ops. One decoded token is faster without, so callers
    ask for more than one only.
    """
    tensors = x, *more
    return (
        x.device.type == "cpu"
        and x.is_floating_point()
        and all(type(one) in (Tensor, nn.Parameter) for one in tensors)
        and all(one.device == x.device and one.dtype == x.dtype for one in more)
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def rows_of(x: Tensor) -> Iterator[slice]:
    """The rows of x `[B, T, ...]` in groups: one row where a row is longer than a block."""
    together = max(1, BLOCK // max(1, x[:1].numel()))
    for row in range(0, x.shape[0], together):
        yield slice(row, min(row + together, x.shape[0]))


def spans_of(x: Tensor) -> list[slice]:
    """The tokens of rows `[B, T, ...]`, cut into blocks, in order."""
    size = max(1, BLOCK // max(1, x[:, :1].numel()))
    return [slice(at, min(at + size, x.shape[1])) for at in range(0, x.shape[1], size)]
