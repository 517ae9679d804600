"""Pieces of several sequences, packed into one batch row or padded."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks_ops.packing import sequence_of


@final
class Pieces:
    """Packed pieces `[1, sum(T), ...]` and the same padded, `[N, max(T), ...]`.

    Pieces of a batch that is not packed stay as they are.
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
