"""What the parts of a layer are given: sizes, the kind of numbers, and a seed."""

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
KINDS = ("normal", "zero", "constant", "large")


@dataclass(frozen=True, repr=False)
class PartInputs(Sequences):
    """Inputs of any part: whole sequences, or packed (lengths), and where they are cut."""

    dims: LayerDims = DIMS[0]
    batch: int = 2
    tokens: int = 6
    packed: tuple[int, ...] | None = None
    cuts: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float64
    kind: str = "normal"  # one of KINDS
    bias: bool = False
    seed: int = 0

    @property
    def position(self) -> Tensor:
        """Int32 `[B, T]`, within the sequence."""
        return self.own.to(torch.int32).expand(self.rows[0], -1).clone()

    @property
    def borders(self) -> list[int]:
        """Where pieces begin and end, 0 and T among them."""
        return [0, *sorted(min(cut, self.tokens) for cut in self.cuts), self.tokens]

    def numbers(self, draw: Draw, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """`[B, T, *shape]` of the kind, with the same random numbers behind every kind."""
        drawn = draw.normal(*self.rows, *shape)
        kinds = {
            "normal": drawn,
            "zero": 0 * drawn,
            "constant": torch.ones_like(drawn),
            "large": 1e4 * drawn,
        }
        return kinds[self.kind].to(dtype or self.dtype)

    def lifetimes(self, draw: Draw, heads: int) -> Tensor:
        """Evict_at int32 `[B, T, heads]`: never stored, for good, for a while, in equal shares."""
        position = self.position[..., None].expand(*self.rows, heads)
        until = position + draw.integers(1, 6, position.shape)
        chosen = draw.choice(position.shape, position.double(), float(NEVER), until.double())
        return chosen.to(torch.int32)


def part_inputs(**fixed: object) -> st.SearchStrategy[PartInputs]:
    """Inputs of a part, whole sequences of at least one token.

    `fixed` fields or strategies take the place of the drawn ones.
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
    """Inputs of a part, packed sequences, not all of them empty."""
    packed = ragged_lengths(9, 4).filter(any)
    return part_inputs(**{"packed": packed, "batch": 1, "tokens": 0, "cuts": (), **fixed})


def cuts(longest: int = 14) -> st.SearchStrategy[tuple[int, ...]]:
    """Where a sequence is cut into pieces, empty ones among them."""
    return st.lists(st.integers(0, longest), min_size=1, max_size=4).map(tuple)
