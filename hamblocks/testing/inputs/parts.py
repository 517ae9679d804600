"""Inputs of the parts of a layer: sizes, a kind of numbers, and a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.protocols import LayerDims
from hamblocks.testing.inputs.draw import Draw, Sequences, building, ragged_lengths, seeds
from hamblocks_ops import NEVER

DIMS = (
    LayerDims(8, 2, 1, 4),
    LayerDims(4, 1, 1, 4),
    LayerDims(16, 4, 2, 4),
    LayerDims(10, 3, 3, 4),
)
"""Sizes of layers that are drawn."""
KINDS = ("normal", "zero", "constant", "large")
"""Kinds of numbers."""


@dataclass(frozen=True, repr=False)
class PartInputs(Sequences):
    """Inputs of any part.

    Attributes:
        dims: sizes of the layer.
        batch: batch size B.
        tokens: number of tokens T of every sequence.
        packed: lengths of sequences packed into one batch row, instead of `batch` and `tokens`;
            None: not packed.
        cuts: positions at which checks cut the sequences into pieces.
        dtype: dtype of the inputs and of the part.
        kind: "normal", "zero", "constant" (ones) or "large" (normal numbers times 10,000).
        bias: whether attention gets a logit bias.
        seed: seed of the numbers and the weights.
    """

    dims: LayerDims = DIMS[0]
    batch: int = 2
    tokens: int = 6
    packed: tuple[int, ...] | None = None
    cuts: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float64
    kind: str = "normal"
    bias: bool = False
    seed: int = 0

    @property
    def position(self) -> Tensor:
        """Position of every token within its sequence, int32 `[B, T]`."""
        return self.own.to(torch.int32).expand(self.rows[0], -1).clone()

    @property
    def borders(self) -> list[int]:
        """Positions at which pieces begin and end, including 0 and T."""
        return [0, *sorted(min(cut, self.tokens) for cut in self.cuts), self.tokens]

    def numbers(self, draw: Draw, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers `[B, T, *shape]` of the kind. All kinds draw equally many random numbers."""
        drawn = draw.normal(*self.rows, *shape)
        kinds = {
            "normal": drawn,
            "zero": 0 * drawn,
            "constant": torch.ones_like(drawn),
            "large": 1e4 * drawn,
        }
        return kinds[self.kind].to(dtype or self.dtype)

    def lifetimes(self, draw: Draw, heads: int) -> Tensor:
        """`evict_at`, int32 `[B, T, heads]`: not stored, stored for good, or for up to 5 tokens."""
        position = self.position[..., None].expand(*self.rows, heads)
        until = position + draw.integers(1, 6, position.shape)
        chosen = draw.choice(position.shape, position.double(), float(NEVER), until.double())
        return chosen.to(torch.int32)


def part_inputs(**fixed: object) -> st.SearchStrategy[PartInputs]:
    """Strategy of inputs of a part: whole sequences of at least one token.

    `fixed` fields or strategies replace the drawn ones.
    """
    fields: dict[str, st.SearchStrategy[Any]] = {
        "dims": st.sampled_from(DIMS),
        "batch": st.integers(1, 2),
        "tokens": st.integers(1, 14),
        "cuts": cuts(),
        "seed": seeds,
    }
    return building(PartInputs, fields, fixed)


def packed_part_inputs(**fixed: object) -> st.SearchStrategy[PartInputs]:
    """Strategy of inputs of a part: packed sequences, at least one of them not empty."""
    packed = ragged_lengths(9, 4).filter(any)
    return part_inputs(**{"packed": packed, "batch": 1, "tokens": 0, "cuts": (), **fixed})


def cuts(longest: int = 14) -> st.SearchStrategy[tuple[int, ...]]:
    """Strategy of the positions at which sequences are cut into pieces; some pieces are empty."""
    return st.lists(st.integers(0, longest), min_size=1, max_size=4).map(tuple)
