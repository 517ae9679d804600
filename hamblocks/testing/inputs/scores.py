"""Draws scores for the select ops and for selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing.inputs.draw import (
    Draw,
    Inputs,
    Sequences,
    borders,
    building,
    dtypes,
    lay_out,
    layouts,
    seeds,
    sequences,
)


@dataclass(frozen=True, repr=False)
class Scores(Sequences):
    """Scores `[B, T, H]`, with ties, infinities or NaN depending on `kind`, maybe with padding."""

    tokens: int = 5
    batch: int = 2
    packed: tuple[int, ...] | None = None
    heads: int = 2
    kind: str = "mixed"  # normal | ties | constant | infinite | near | mixed
    empty_rows: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    @property
    def has_tokens(self) -> bool:
        """Whether there is a token in any batch row."""
        return all(self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """The arguments by name."""
        draw = Draw(self.seed)
        rows, length = self.rows
        shape = rows, length, self.heads
        few, normal = draw.integers(-2, 3, shape).double(), draw.normal(*shape)
        inf = float("inf")
        score = {
            "normal": lambda: normal,
            "ties": lambda: few,
            "constant": lambda: torch.zeros(shape),
            "near": lambda: few / 4 + draw.integers(-1, 2, shape) * torch.finfo(self.dtype).eps / 8,
            "infinite": lambda: draw.choice(shape, inf, -inf, torch.nan),
            "mixed": lambda: draw.choice(shape, few, normal, inf, -inf, torch.nan, -0.0),
        }[self.kind]()
        result = {"score": lay_out(score.to(self.dtype), self.layout)}
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        if self.empty_rows:
            # ascending but not consecutive, as in a cache; padding at random places
            position = (3 * self.own[:, None] + draw.integers(0, 3, shape)).masked_fill(
                draw.integers(0, 4, shape) == 0, -1
            )
            result["position"] = position.to(torch.int32)
        return result


def scores(**fixed: object) -> st.SearchStrategy[Scores]:
    """Strategy of scores for the select ops; `fixed` fields or strategies replace drawn ones."""
    fields = sequences() | {
        "heads": st.integers(1, 3),
        "kind": st.sampled_from(["mixed", "normal", "ties", "constant", "infinite", "near"]),
        "empty_rows": st.booleans(),
        "dtype": dtypes,
        "layout": layouts,
    }
    return building(Scores, fields, fixed)


@dataclass(frozen=True, repr=False)
class ScorePieces(Inputs):
    """Scores in pieces. Each batch row has its own length and its own cuts."""

    lengths: tuple[int, ...] = (9, 6)
    cuts: tuple[tuple[int, int, int], ...] = (
        (3, 2, 0),
        (5, 5, 1),
    )  # where every piece ends in each batch row
    heads: int = 2
    kind: str = "ties"  # as in Scores
    seed: int = 0

    @property
    def score(self) -> Tensor:
        """Float32 `[N, max(lengths), H]`."""
        longest = max(self.lengths, default=0)
        return Scores(
            longest, len(self.lengths), None, self.heads, self.kind, seed=self.seed
        ).tensors()["score"]

    @property
    def ends(self) -> Tensor:
        """Int64 `[pieces, N]`: where every piece ends, 0 first and the lengths last."""
        rows = [
            [0, *sorted(min(cut[n % 3], length) for cut in self.cuts), length]
            for n, length in enumerate(self.lengths)
        ]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), len(self.cuts) + 2).T


def score_pieces(**fixed: object) -> st.SearchStrategy[ScorePieces]:
    """Strategy of scores in pieces; `fixed` fields or strategies replace the drawn ones."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "lengths": st.lists(st.integers(0, 16), min_size=1, max_size=3).map(tuple),
        "cuts": st.lists(st.tuples(*[st.integers(0, 16)] * 3), max_size=5).map(tuple),
        "heads": st.integers(1, 2),
        "kind": st.sampled_from(["ties", "normal", "mixed", "constant", "near"]),
        "seed": seeds,
    }
    return building(ScorePieces, fields, fixed)
