"""Draws calls of `paged_attention`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing.inputs.draw import Draw, Inputs, building, lay_out, layouts, seeds
from hamblocks_ops import NEVER, Pages, paged_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
LAST = 40
"""Upper bound of the drawn positions of keys. Positions of queries may be slightly higher."""


@dataclass(frozen=True, repr=False)
class PagedInputs(Inputs):
    """A call of paged_attention.

    `rows` is H, `together` is W and `width` is M. A slab is (number of pages, page size).
    """

    queries: int = 1
    sequences: int = 2
    rows: int = 2
    together: int = 1
    group: int = 1
    dim: int = 4
    slabs: tuple[tuple[int, int], ...] = ((9, 4), (5, 4))
    width: int = 3
    forked: bool = False
    policy: str = "any"  # any | all | none
    bias: str = "none"  # none | some | hidden
    garbage: float | None = NAN
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    seed: int = 0

    @property
    def pages(self) -> int:
        """Pages of all slabs."""
        return sum(size for size, _ in self.slabs)

    def tensors(self) -> dict[str, Tensor]:
        """Arguments of `paged`. Slots that no query sees, and unlisted pages, hold garbage."""
        draw = Draw(self.seed, self.layout)
        heads = self.rows * self.together * self.group
        index = torch.int64 if self.seed % 2 else torch.int32
        asks = draw.integers(-1, LAST + 5, (self.sequences, self.queries)).to(index)
        table = self.table(draw)
        result = {
            "q": draw.normal(
                self.sequences, self.queries, heads, self.dim, dtype=self.dtype, scale=2
            ),
            "block_table": table.to(index),
            "query_position": asks,
        }
        begin = 0
        for number, shape in enumerate(self.slabs):
            position = draw.integers(0, LAST, shape)
            evict_at = self.lifetimes(draw, position)
            bias = draw.normal(*shape, dtype=self.wide) if self.bias != "none" else None
            if bias is not None and self.bias == "hidden":
                bias = draw.choice(shape, bias, bias, float("-inf")).to(self.wide)
            size = *shape, self.together, self.dim
            k, v = (draw.normal(*size, dtype=self.dtype, scale=scale) for scale in (2, 1))
            if self.garbage is not None:
                unseen = ~self.seen(table, asks, begin, position, evict_at)
                k, v = (x.masked_fill(unseen[..., None, None], self.garbage) for x in (k, v))
                bias = None if bias is None else bias.masked_fill(unseen, self.garbage)
            fields: dict[str, Tensor | None] = {
                "k": lay_out(k, self.layout),
                "v": lay_out(v, self.layout),
                "position": position.to(torch.int32),
                "evict_at": evict_at.to(torch.int32),
                "logit_bias": bias,
            }
            result |= {f"{name}{number}": x for name, x in fields.items() if x is not None}
            begin += shape[0]
        return result

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the biases."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def table(self, draw: Draw) -> Tensor:
        """Page tables with -1 anywhere; about every fifth stream lists no page."""
        shape = self.sequences, self.rows, self.width
        entries = self.sequences * self.rows * self.width
        if self.forked:
            table = (
                draw.integers(-1, max(self.pages, 1), shape)
                if self.pages
                else torch.full(shape, -1)
            )
        else:
            order = torch.randperm(max(self.pages, entries), generator=draw.generator)[:entries]
            table = torch.where(order < self.pages, order, -1).view(shape)
        gone = (draw.integers(0, 5, shape) == 0) | (draw.integers(0, 5, (*shape[:2], 1)) == 0)
        return table.masked_fill(gone, -1)

    def lifetimes(self, draw: Draw, position: Tensor) -> Tensor:
        """evict_at `[P, page]`."""
        shape = tuple(position.shape)
        if self.policy != "any":
            return torch.full(shape, NEVER) if self.policy == "all" else position
        ends = (
            torch.full(shape, NEVER),
            position,
            position + 7,
            torch.zeros(shape),
            draw.integers(-2, LAST, shape),
        )
        return draw.choice(shape, *(x.double() for x in ends)).long()

    @staticmethod
    def seen(table: Tensor, asks: Tensor, begin: int, position: Tensor, evict_at: Tensor) -> Tensor:
        """Which slots of a slab any query of any stream sees, bool `[P, page]`."""
        seen = torch.zeros(position.shape, dtype=torch.bool)
        for n, times in enumerate(asks.tolist()):
            for page in (table[n].flatten() - begin).tolist():
                for t in times if 0 <= page < len(position) else ():
                    seen[page] |= (t >= 0) & (position[page] <= t) & (t < evict_at[page])
        return seen


def paged_inputs(**fixed: object) -> st.SearchStrategy[PagedInputs]:
    """Strategy of calls of paged_attention; `fixed` fields or strategies replace drawn ones."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "queries": st.integers(0, 8),
        "sequences": st.integers(0, 3),
        "rows": st.integers(1, 3),
        "together": st.integers(1, 3),
        "group": st.integers(1, 3),
        "dim": st.integers(1, 9),
        "slabs": st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=3).map(tuple),
        "width": st.integers(0, 5),
        "forked": st.booleans(),
        "policy": st.sampled_from(["any", "any", "all", "none"]),
        "bias": st.sampled_from(["none", "some", "hidden"]),
        "garbage": st.sampled_from([None, NAN, INF, -INF, 1e4]),
        "dtype": st.sampled_from(DTYPES),
        "layout": layouts,
        "seed": seeds,
    }
    calls: st.SearchStrategy[PagedInputs] = building(PagedInputs, fields, fixed)
    return calls.filter(lambda case: bool(case.slabs) or case.together == 1)


def slabs_of(fields: dict[str, Tensor]) -> list[Pages]:
    """Makes the slabs from the fields k0, v0, ..., k1, ..."""
    numbers = sorted({int(re.sub(r"\D", "", name)) for name in fields})
    named = ({name: fields.get(f"{name}{i}") for name in Pages._fields} for i in numbers)
    return [Pages(**one) for one in named]  # type: ignore[arg-type]


def paged(
    q: Tensor,
    block_table: Tensor,
    query_position: Tensor,
    *,
    impl: str = "auto",
    shared: Any = None,
    run: Callable[..., Any] | None = None,
    **fields: Any,
) -> Any:
    """Calls the op, or `run`, with slabs whose fields are separate arguments."""
    more = {"shared": shared, "impl": impl} if run is None else {}
    with torch.no_grad():
        return (run or paged_attention)(
            q, slabs_of(fields), block_table, query_position=query_position, **more
        )
