"""Draws calls of `gated_delta_rule`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing.inputs.draw import (
    Draw,
    Sequences,
    borders,
    building,
    dtypes,
    lay_out,
    layouts,
    sequences,
)


@dataclass(frozen=True, repr=False)
class DeltaRuleInputs(Sequences):
    """A call of gated_delta_rule; `packed` (lengths) replaces `batch` and `tokens`."""

    tokens: int = 5
    batch: int = 2
    packed: tuple[int, ...] | None = None
    heads: int = 2
    group: int = 1
    key_dim: int = 4
    value_dim: int = 3
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    decay: str = "mild"  # none | mild | hard | forget
    write: str = "mild"  # mild | zero | two | any
    state: bool = True
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The arguments by name."""
        draw = Draw(self.seed, self.layout)
        rows, length = self.rows
        sequences = rows if self.packed is None else len(self.packed)
        value_heads = self.heads * self.group
        shape = rows, length, value_heads
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        key = draw.normal(rows, length, self.heads, self.key_dim)
        result = {
            "q": draw.normal(rows, length, self.heads, self.key_dim, dtype=self.dtype),
            "k": lay_out(torch.nn.functional.normalize(key, dim=-1).to(self.dtype), self.layout),
            "v": draw.normal(*shape, self.value_dim, dtype=self.dtype),
        }
        half, zero, two = torch.rand(shape, generator=draw.generator, dtype=torch.float64), 0.0, 2.0
        beta = {
            "mild": lambda: half,
            "zero": lambda: torch.zeros_like(half),
            "two": lambda: torch.full_like(half, two),
            "any": lambda: draw.choice(shape, zero, half, 2 * half, two),
        }[self.write]()
        result["beta"] = lay_out(beta.to(wide), self.layout)
        gone = torch.rand(shape, generator=draw.generator, dtype=torch.float64)
        if self.decay != "none":
            g = {
                "mild": lambda: -0.2 * gone,
                "hard": lambda: draw.choice(shape, -0.2 * gone, -5 * gone, -1000.0),
                "forget": lambda: draw.choice(shape, 0.0, -0.2 * gone, -1000.0, float("-inf")),
            }[self.decay]()
            result["g"] = lay_out(g.to(wide), self.layout)
        if self.state:
            result["initial_state"] = draw.normal(
                sequences, value_heads, self.key_dim, self.value_dim, dtype=wide
            )
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        return result


def delta_rule_inputs(**fixed: object) -> st.SearchStrategy[DeltaRuleInputs]:
    """Strategy of calls of gated_delta_rule; `fixed` fields or strategies replace drawn ones."""
    fields = sequences() | {
        "heads": st.integers(1, 2),
        "group": st.integers(1, 2),
        "key_dim": st.integers(1, 8),
        "value_dim": st.integers(1, 8),
        "dtype": dtypes,
        "layout": layouts,
        "decay": st.sampled_from(["none", "mild", "hard", "forget"]),
        "write": st.sampled_from(["mild", "zero", "two", "any"]),
        "state": st.booleans(),
    }
    return building(DeltaRuleInputs, fields, fixed)
