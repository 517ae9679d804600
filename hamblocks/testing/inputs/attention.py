"""Draws calls of `selected_attention`, and lifetimes as selectors produce them."""

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
from hamblocks_ops import NEVER

POLICIES = ("any", "all", "none", "some", "window", "first", "topk")
policies: st.SearchStrategy[str] = st.sampled_from(POLICIES)


def lifetimes(policy: str, draw: Draw, position: Tensor) -> Tensor:
    """evict_at under a policy, int64 like `position`; "any": a random policy for each token."""
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
    if policy != "any":
        return kinds[policy]
    # also values that no policy produces: lifetimes that end before the token, or below 0
    return draw.choice(
        shape, *(x.double() for x in kinds.values()), draw.integers(-2, most, shape).double()
    ).long()


@dataclass(frozen=True, repr=False)
class EvictAt(Sequences):
    """Lifetimes `[B, T, H]` of whole sequences under a policy."""

    tokens: int = 5
    batch: int = 2
    packed: tuple[int, ...] | None = None
    heads: int = 2
    policy: str = "any"  # one of POLICIES
    seed: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """evict_at int32 `[B, T, H]`, and cu_seqlens if packed."""
        position = self.own[:, None].expand(*self.rows, self.heads)
        result = {"evict_at": lifetimes(self.policy, Draw(self.seed), position).to(torch.int32)}
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        return result


def evict_at(**fixed: object) -> st.SearchStrategy[EvictAt]:
    """Strategy of lifetimes; `fixed` fields or strategies replace the drawn ones."""
    fields = sequences() | {
        "heads": st.integers(1, 3),
        "policy": policies,
    }
    return building(EvictAt, fields, fixed)


@dataclass(frozen=True, repr=False)
class AttentionInputs(Sequences):
    """A call of selected_attention: a batch, packed sequences, or queries over `cache` keys."""

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
        """The arguments by name."""
        draw = Draw(self.seed, self.layout)
        rows, queries = self.rows
        keys = queries if self.cache is None or self.packed is not None else self.cache
        shape = rows, keys, self.kv_heads
        result = {
            "q": draw.normal(
                rows, queries, self.kv_heads * self.group, self.dim, dtype=self.dtype, scale=2
            ),
            "k": draw.normal(*shape, self.dim, dtype=self.dtype, scale=2),
            "v": draw.normal(*shape, self.dim, dtype=self.dtype),
        }
        own = self.own if self.packed is not None else torch.arange(keys)
        if self.packed is not None:
            result["cu_seqlens"] = borders(self.packed)
        position = own[:, None].expand(shape)
        if self.cache is not None and self.packed is None:
            # keys in random order, different for each head; the last keys may be padding
            shuffled = torch.rand(shape, generator=draw.generator).argsort(1)
            position = shuffled if self.seed % 2 else shuffled[..., :1]
            result["key_position"] = position.to(torch.int32)
            position = position.expand(shape)
            start = int(draw.integers(0, keys + 1, (1,)))
            result["query_position"] = (
                (start + torch.arange(queries)).expand(rows, queries).to(torch.int32)
            )
            result["key_lengths"] = draw.integers(
                0, keys + 1, (rows, self.kv_heads) if self.seed % 3 else (rows,)
            )
        evict_at = lifetimes(self.policy, draw, position)
        result["evict_at"] = lay_out(
            (evict_at[..., :1] if self.shared else evict_at).to(torch.int32), self.layout
        )
        if self.bias != "none":
            bias = draw.normal(*shape[:2], 1 if self.bias == "shared" else shape[2])
            if self.bias == "hidden":
                bias = draw.choice(tuple(bias.shape), bias, bias, float("-inf"))
            result["logit_bias"] = lay_out(bias.to(self.dtype), self.layout)
        return result


def attention_inputs(**fixed: object) -> st.SearchStrategy[AttentionInputs]:
    """Strategy of calls of selected_attention; `fixed` fields or strategies replace drawn ones."""
    fields = sequences() | {
        "cache": st.none() | st.integers(0, 40),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "dim": st.integers(1, 9),
        "dtype": dtypes,
        "layout": layouts,
        "policy": policies,
        "shared": st.booleans(),
        "bias": st.sampled_from(["none", "some", "hidden", "shared"]),
    }
    return building(AttentionInputs, fields, fixed)
