"""What properties are drawn over: sizes, kinds and a seed. Tensors are built from the seed, so shrinking is fast."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks_ops import NEVER

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
tokens = st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65]), st.integers(0, 40))
packs = st.lists(st.one_of(st.sampled_from([0, 0, 1]), st.integers(0, 20)), max_size=5).map(tuple)
layouts = st.sampled_from(["contiguous", "transposed", "strided"])


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int, layout: str = "contiguous") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layout = layout

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return lay_out(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype), self.layout)

    def uniform(self, *shape: int, low: float = 0, high: float = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return lay_out(drawn.to(dtype), self.layout)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def choice(self, shape: tuple[int, ...], *options: Tensor | float) -> Tensor:
        """Every element from one of the options at random."""
        which = self.integers(0, len(options), shape)
        result = torch.zeros(shape, dtype=torch.float64)
        for index, option in enumerate(options):
            result = torch.where(which == index, option, result)
        return result


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


def borders(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pieces(lengths: tuple[int, ...]) -> list[slice]:
    """The tokens of every sequence."""
    ends = borders(lengths).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


@dataclass(frozen=True)
class DeltaRule:
    """A call of gated_delta_rule; with `packed` (lengths) in place of `batch` and `tokens`."""

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
        draw = Draw(self.seed, self.layout)
        rows, length = (self.batch, self.tokens) if self.packed is None else (1, sum(self.packed))
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
        result["beta"] = beta.to(wide)
        gone = torch.rand(shape, generator=draw.generator, dtype=torch.float64)
        g = {
            "none": lambda: None,
            "mild": lambda: -0.2 * gone,
            "hard": lambda: draw.choice(shape, -0.2 * gone, -5 * gone, -1000.0),
            "forget": lambda: draw.choice(shape, 0.0, -0.2 * gone, -1000.0, float("-inf")),
        }[self.decay]()
        if g is not None:
            result["g"] = g.to(wide)
        if self.state:
            result["initial_state"] = draw.normal(sequences, value_heads, self.key_dim, self.value_dim, dtype=wide)
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        return result


def delta_rules(**fixed: object) -> st.SearchStrategy[DeltaRule]:
    """Calls of gated_delta_rule; `fixed` fields or strategies take the place of the drawn ones."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "tokens": tokens,
        "batch": st.integers(0, 2),
        "packed": st.none() | packs,
        "heads": st.integers(1, 2),
        "group": st.integers(1, 2),
        "key_dim": st.integers(1, 8),
        "value_dim": st.integers(1, 8),
        "dtype": dtypes,
        "layout": layouts,
        "decay": st.sampled_from(["none", "mild", "hard", "forget"]),
        "write": st.sampled_from(["mild", "zero", "two", "any"]),
        "state": st.booleans(),
        "seed": seeds,
    }
    return st.builds(DeltaRule, **(fields | _as_strategies(fixed)))


@dataclass(frozen=True)
class Attention:
    """A call of selected_attention: over its own keys, packed (lengths), or over a cache of `cache` keys."""

    tokens: int = 5
    batch: int = 2
    packed: tuple[int, ...] | None = None
    cache: int | None = None
    kv_heads: int = 2
    group: int = 1
    dim: int = 4
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    policy: str = "any"  # all | none | some | window | first | topk | any
    shared: bool = False
    bias: str = "none"  # none | some | hidden | shared
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        draw = Draw(self.seed, self.layout)
        rows, queries = (self.batch, self.tokens) if self.packed is None else (1, sum(self.packed))
        keys = queries if self.cache is None or self.packed is not None else self.cache
        shape = rows, keys, self.kv_heads
        result = {
            "q": 2 * draw.normal(rows, queries, self.kv_heads * self.group, self.dim, dtype=self.dtype),
            "k": 2 * draw.normal(*shape, self.dim, dtype=self.dtype),
            "v": draw.normal(*shape, self.dim, dtype=self.dtype),
        }
        own = torch.arange(keys)
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
            own = torch.cat([torch.arange(length) for length in (*self.packed, 0)])
        position = own[:, None].expand(shape)
        if self.cache is not None and self.packed is None:
            # a cache in another order than time, another one per head, of which the last keys may be padding
            shuffled = torch.rand(shape, generator=draw.generator).argsort(1)
            position = shuffled if self.seed % 2 else shuffled[..., :1]
            result["key_position"] = position.to(torch.int32)
            position = position.expand(shape)
            start = int(draw.integers(0, keys + 1, (1,)))
            result["query_position"] = (start + torch.arange(queries)).expand(rows, queries).to(torch.int32)
            result["key_lengths"] = draw.integers(0, keys + 1, (rows, self.kv_heads) if self.seed % 3 else (rows,))
        evict_at = self.lifetimes(draw, position)
        result["evict_at"] = (evict_at[..., :1] if self.shared else evict_at).to(torch.int32)
        if self.bias != "none":
            bias = draw.normal(*shape[:2], 1 if self.bias == "shared" else shape[2])
            if self.bias == "hidden":
                bias = draw.choice(tuple(bias.shape), bias, bias, float("-inf"))
            result["logit_bias"] = bias.to(self.dtype)
        return result

    def lifetimes(self, draw: Draw, position: Tensor) -> Tensor:
        """evict_at of each policy, int64; `any` takes one at random for every token."""
        shape = tuple(position.shape)
        most = int(position.max()) + 2 if position.numel() else 1
        some = draw.integers(0, 2, shape).bool()
        kinds = {
            "all": torch.full(shape, NEVER),
            "none": position,
            "some": torch.where(some, NEVER, position),
            "window": position + 3,
            "first": torch.where(position < 4, NEVER, position),
            "topk": torch.maximum(position, draw.integers(0, most, shape)),
        }
        if self.policy != "any":
            return kinds[self.policy]
        # beside them what no policy gives: ends before the token itself, or below 0
        return draw.choice(shape, *(x.double() for x in kinds.values()), draw.integers(-2, most, shape).double()).long()


def attentions(**fixed: object) -> st.SearchStrategy[Attention]:
    """Calls of selected_attention; `fixed` fields or strategies take the place of the drawn ones."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "tokens": tokens,
        "batch": st.integers(0, 2),
        "packed": st.none() | packs,
        "cache": st.none() | st.integers(0, 40),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "dim": st.integers(1, 9),
        "dtype": dtypes,
        "layout": layouts,
        "policy": st.sampled_from(["any", "all", "none", "some", "window", "first", "topk"]),
        "shared": st.booleans(),
        "bias": st.sampled_from(["none", "some", "hidden", "shared"]),
        "seed": seeds,
    }
    return st.builds(Attention, **(fields | _as_strategies(fixed)))


@dataclass(frozen=True)
class Scores:
    """Scores [B, T, H] with as many ties, infinities and NaN as `kind` says, and perhaps empty rows."""

    tokens: int = 5
    batch: int = 2
    packed: tuple[int, ...] | None = None
    heads: int = 2
    kind: str = "mixed"  # normal | ties | constant | mixed | infinite
    empty_rows: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        draw = Draw(self.seed)
        rows, length = (self.batch, self.tokens) if self.packed is None else (1, sum(self.packed))
        shape = rows, length, self.heads
        few, normal = draw.integers(-2, 3, shape).double(), draw.normal(*shape)
        inf = float("inf")
        score = {
            "normal": lambda: normal,
            "ties": lambda: few,
            "constant": lambda: torch.zeros(shape),
            "infinite": lambda: draw.choice(shape, inf, -inf, torch.nan),
            "mixed": lambda: draw.choice(shape, few, normal, inf, -inf, torch.nan, -0.0),
        }[self.kind]()
        result = {"score": lay_out(score.to(self.dtype), self.layout)}
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        if self.empty_rows:
            # ascending but not consecutive, as a cache holds them; empty rows anywhere
            own = torch.cat([torch.arange(n) for n in (*(self.packed or (length,)), 0)])
            position = (3 * own[:, None] + draw.integers(0, 3, shape)).masked_fill(draw.integers(0, 4, shape) == 0, -1)
            result["position"] = position.to(torch.int32)
        return result


def scores(**fixed: object) -> st.SearchStrategy[Scores]:
    """Scores for the select ops; `fixed` fields or strategies take the place of the drawn ones."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "tokens": tokens,
        "batch": st.integers(0, 2),
        "packed": st.none() | packs,
        "heads": st.integers(1, 3),
        "kind": st.sampled_from(["mixed", "normal", "ties", "constant", "infinite"]),
        "empty_rows": st.booleans(),
        "dtype": dtypes,
        "layout": layouts,
        "seed": seeds,
    }
    return st.builds(Scores, **(fields | _as_strategies(fixed)))


def _as_strategies(fixed: dict[str, object]) -> dict[str, st.SearchStrategy[object]]:
    return {name: x if isinstance(x, st.SearchStrategy) else st.just(x) for name, x in fixed.items()}
