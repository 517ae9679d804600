"""Draws calls of `surprise`: residuals and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing.inputs.draw import Draw, Inputs, building, dtypes, layouts, seeds

EXTREMES = (0.0, 1e-45, 1e-38, -1e-38, 1e-20, 1.0, -1.0, 1e20, 1e30, -1e30)
KINDS = ("normal", "zero", "right", "extreme")
"""zero: residual and v are 0; right: the residual is 0; extreme: near the limits of float32."""


@dataclass(frozen=True, repr=False)
class RowInputs(Inputs):
    """Residuals and values `[B, T, H, V]`."""

    batch: int = 2
    tokens: int = 5
    heads: int = 2
    dim: int = 4
    kind: str = "normal"  # one of KINDS
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The arguments by name."""
        draw = Draw(self.seed, self.layout)
        shape = self.batch, self.tokens, self.heads, self.dim
        v = draw.normal(*shape, dtype=self.dtype)
        residual = (0.5 * v + draw.normal(*shape)).to(self.dtype)
        if self.kind == "extreme":
            residual, v = (draw.choice(shape, *EXTREMES).to(self.dtype) for _ in range(2))
        if self.kind in ("zero", "right"):
            residual = torch.zeros_like(residual)
        if self.kind == "zero":
            v = torch.zeros_like(v)
        return {"residual": residual, "v": v}


def row_inputs(**fixed: object) -> st.SearchStrategy[RowInputs]:
    """Strategy of calls of surprise; `fixed` fields or strategies replace the drawn ones."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "batch": st.integers(0, 2),
        "tokens": st.integers(0, 6),
        "heads": st.integers(1, 3),
        "dim": st.integers(1, 9),
        "dtype": dtypes,
        "layout": layouts,
        "seed": seeds,
    }
    return building(RowInputs, fields, fixed)
