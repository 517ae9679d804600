from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import Draw, Scores, scores, seeds
from hamblocks_ops import NEVER, compact, select_threshold, select_topk


def placed(call: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Position [B, T, H] and sequence [T] of every token, by a loop."""
    batch, tokens, heads = call["score"].shape
    lengths = call["cu_seqlens"].diff().tolist() if "cu_seqlens" in call else [tokens]
    own = torch.tensor([t for n in lengths for t in range(n)], dtype=torch.int64)
    sequence = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    position = call.get("position", own[None, :, None].expand(batch, tokens, heads)).long()
    return position, sequence if "cu_seqlens" in call else None


@given(case=scores(tokens=st.integers(0, 9), packed=None, batch=1, heads=1), k=st.integers(0, 4))
def test_topk_keeps_the_best_at_every_time(case: Scores, k: int) -> None:
    """Against sorting what was seen so far, anew for every query."""
    call = case.tensors()
    evict_at = select_topk(**call, k=k)[0, :, 0].tolist()
    where = placed(call)[0][0, :, 0].tolist()
    score = [float("-inf") if x != x else x for x in call["score"][0, :, 0].tolist()]
    for t, now in enumerate(where):
        if now >= 0:
            seen = [j for j in range(t + 1) if where[j] >= 0]
            best = sorted(seen, key=lambda j: (-score[j], j))[:k]
            assert [j for j in seen if now < evict_at[j]] == sorted(best)


@given(case=scores(), seed=seeds)
def test_threshold_per_head(case: Scores, seed: int) -> None:
    call = case.tensors()
    tau = Draw(seed).choice((case.heads,), 0.0, 0.5, float("inf"), float("-inf")).float()
    got = select_threshold(**call, tau=tau)
    for h in range(case.heads):
        alone = call | {"score": call["score"][..., h : h + 1]}
        if "position" in call:
            alone["position"] = call["position"][..., h : h + 1]
        assert torch.equal(got[..., h : h + 1], select_threshold(**alone, tau=float(tau[h])))
        assert torch.equal(got[..., h : h + 1], select_threshold(**alone, tau=tau[h]))


@pytest.mark.parametrize("cap", [0, 2])
def test_compact_refuses_a_capacity_that_is_too_small(cap: int) -> None:
    evict_at = torch.full((1, 3, 1), NEVER, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^capacity: expected at least the 3 tokens .*got 2|got 0"):
        compact(evict_at, capacity=cap)


@given(case=scores(), seed=seeds, spare=st.integers(0, 5))
def test_a_capacity_fills_the_lists_up(case: Scores, seed: int, spare: int) -> None:
    call = case.tensors()
    tokens = call.pop("score").shape[1]
    own = call.get("position", torch.arange(tokens)[None, :, None]).expand(case.tensors()["score"].shape)
    evict_at = own + Draw(seed).integers(-2, 4, tuple(own.shape))
    tight = compact(evict_at, **call)
    length = tight.index.shape[2]
    wide = compact(evict_at, **call, capacity=length + spare)
    assert torch.equal(wide.lengths, tight.lengths)
    for name, fill in (("index", tokens), ("position", NEVER), ("evict_at", 0)):
        got, expected = getattr(wide, name), getattr(tight, name)
        assert torch.equal(got[..., :length], expected)
        assert bool((got[..., length:] == fill).all())
