"""Converts pieces of sequences between packed and padded form."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks_ops.packing import sequence_of


@final
class Pieces:
    """Converts tensors between packed `[1, sum(T), ...]` and padded form `[N, max(T), ...]`.

    Without `cu_seqlens` the batch is not packed, and both conversions return their argument.
    """

    def __init__(self, cu_seqlens: Tensor | None, sequences: int, tokens: int) -> None:
        self.packed = cu_seqlens is not None
        self.sequences = sequences
        if cu_seqlens is not None:
            borders = cu_seqlens.long()
            self.sequence = sequence_of(cu_seqlens, tokens)
            self.offset = torch.arange(tokens, device=borders.device) - borders[self.sequence]
            self.longest = int(borders.diff().amax()) if sequences else 0

    def apart(self, x: Tensor, fill: float) -> Tensor:
        """`[1, sum(T), ...]` -> `[N, max(T), ...]`, `fill` where there is no token."""
        if not self.packed:
            return x
        padded = x.new_full((self.sequences, self.longest, *x.shape[2:]), fill)
        return padded.index_put((self.sequence, self.offset), x[0])

    def together(self, x: Tensor) -> Tensor:
        """`[N, max(T), ...]` -> `[1, sum(T), ...]`."""
        return x[self.sequence, self.offset][None] if self.packed else x
