"""Arithmetic per token on a CPU, in blocks of tokens that fit the cache.

Torch takes such a formula op by op, and each op passes over all tokens: at a few thousand tokens
every pass goes to the main memory. In blocks, the passes of a formula find their tokens in the
cache. Gradients are written out in the same way, and save nothing but the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hamblocks_ops.dispatch import transformed

BLOCK = 1 << 17
"""Numbers of a block: 512 KB in float32, so that the four or so that a formula has fit the cache."""


def runs(*tensors: Tensor) -> bool:
    """Whether plain tensors on a CPU, of one dtype, can be taken in blocks.

    Recorded calls that a transform of `torch.func` or a compiler looks through cannot.
    """
    first = tensors[0]
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and all(x.device.type == "cpu" and x.dtype == first.dtype for x in tensors)
        and first.is_floating_point()
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of the blocks of x `[B, T, ...]`, in order of tokens within rows."""
    rows, tokens = x.shape[:2]
    width = x[0, 0].numel() if rows and tokens else 1
    together = max(1, BLOCK // max(1, width * tokens))
    size = max(1, BLOCK // max(1, width * min(together, rows or 1)))
    for row in range(0, rows, together):
        for token in range(0, tokens, size):
            yield slice(row, row + together), slice(token, min(token + size, tokens))
