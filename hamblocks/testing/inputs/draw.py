"""How inputs are drawn: hypothesis draws sizes, kinds and a seed, and the seed gives the tensors.

Shrinking then works on a few integers, not on the elements of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "strided")

seeds: st.SearchStrategy[int] = st.integers(0, 2**16)
"""Strategy of seeds, 0 to 65536."""
dtypes: st.SearchStrategy[torch.dtype] = st.sampled_from(DTYPES)
"""Strategy of floating dtypes: float64, float32, bfloat16."""
layouts: st.SearchStrategy[str] = st.sampled_from(LAYOUTS)
"""Strategy of layouts in memory: contiguous, transposed, strided."""


def ragged_lengths(
    longest: int = 20, most: int = 5, chunk: int | None = None
) -> st.SearchStrategy[tuple[int, ...]]:
    """Strategy of the lengths of packed sequences, in tokens. Many are 0 or 1.

    Args:
        longest: the longest length, apart from those that `chunk` adds.
        most: the largest number of sequences; the smallest is 0.
        chunk: chunk size of a kernel. The lengths chunk - 1, chunk and chunk + 1 are drawn too.
    """
    special = [0, 0, 1] + ([] if chunk is None else [chunk - 1, chunk, chunk + 1])
    return st.lists(
        st.one_of(st.sampled_from(special), st.integers(0, longest)), max_size=most
    ).map(tuple)


def lengths(longest: int = 40, chunk: int = 64) -> st.SearchStrategy[int]:
    """Strategy of the length of one sequence, in tokens; often 0, 1 or close to `chunk`."""
    return st.one_of(
        st.sampled_from([0, 1, 2, chunk - 1, chunk, chunk + 1]), st.integers(0, longest)
    )


class Inputs:
    """Base of all inputs: frozen dataclasses of sizes, kinds and a seed. `eval(repr(x)) == x`."""

    def __repr__(self) -> str:
        """Shows only the fields that differ from the defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = ((field.name, getattr(self, field.name), field.default) for field in fields)
        shown = ", ".join(f"{name}={x!r}" for name, x, default in values if x != default)
        return f"{type(self).__name__}({shown})"


def building(
    inputs: type[T], fields: Mapping[str, st.SearchStrategy[Any]], fixed: Mapping[str, object]
) -> st.SearchStrategy[T]:
    """Strategy of `inputs`. Values or strategies in `fixed` replace those in `fields`."""
    chosen = {
        name: x if isinstance(x, st.SearchStrategy) else st.just(x) for name, x in fixed.items()
    }
    return st.builds(inputs, **{**fields, **chosen})


class Sequences(Inputs):
    """Inputs `[B, T, ...]`: a batch, or packed sequences (B = 1). Subclasses have these fields."""

    tokens: int
    batch: int
    packed: tuple[int, ...] | None

    @property
    def rows(self) -> tuple[int, int]:
        """B and T."""
        return (self.batch, self.tokens) if self.packed is None else (1, sum(self.packed))

    @property
    def own(self) -> Tensor:
        """Position of every token within its sequence, int64 `[T]`."""
        return placing((self.tokens,) if self.packed is None else self.packed)[0]


def sequences() -> dict[str, st.SearchStrategy[Any]]:
    """Strategies of the fields of `Sequences` and of the seed, by name."""
    return {
        "tokens": lengths(),
        "batch": st.integers(0, 2),
        "packed": st.none() | ragged_lengths(),
        "seed": seeds,
    }


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int, layout: str = "contiguous") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layout = layout

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        """Normal numbers with standard deviation `scale`, drawn in float64 and then rounded."""
        drawn = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return lay_out(drawn.to(dtype), self.layout)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return lay_out(
            torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype), self.layout
        )

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """Uniform integers in [low, high), int64."""
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def choice(self, shape: Sequence[int], *options: Tensor | float) -> Tensor:
        """Takes each element from a random one of the options; float64."""
        which = self.integers(0, len(options), shape)
        result = torch.zeros(tuple(shape), dtype=torch.float64)
        for index, option in enumerate(options):
            result = torch.where(which == index, option, result)
        return result


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Copies a tensor to other strides.

    Args:
        x: the values.
        layout: "contiguous"; "transposed", dimensions 1 and 2 swapped in memory; or "strided", with
            a NaN (7 for integers) after every element in memory.
    """
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan if x.is_floating_point() else 7)], -1)[
            ..., 0
        ]
    return x


def borders(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens`, int32 `[N+1]`, of packed sequences with these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def placing(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The position in its sequence and the sequence of every packed token, int64 `[T]` each."""
    own = torch.tensor([t for length in lengths for t in range(length)], dtype=torch.int64)
    sequence = torch.tensor(
        [n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64
    )
    return own, sequence


def pieces(lengths: Sequence[int]) -> list[slice]:
    """The tokens of every packed sequence, as slices of the packed dimension."""
    return [slice(start, stop) for start, stop in pairwise(borders(lengths).tolist())]
