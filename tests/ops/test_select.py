from __future__ import annotations

import re
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hamblocks.testing import Draw, Scores, scores, seeds
from hamblocks.testing.inputs.ops import placed
from hamblocks_ops import NEVER, compact, select_first, select_threshold, select_topk, select_window
from hamblocks_ops.select import reference


@given(case=scores(tokens=st.integers(0, 9), packed=None, batch=1, heads=1), k=st.integers(0, 4))
def test_topk_keeps_the_best_at_every_time(case: Scores, k: int) -> None:
    """Against sorting what was seen so far, anew for every query."""
    call = case.tensors()
    evict_at = select_topk(**call, k=k)[0, :, 0].tolist()
    where = placed(call["score"], call.get("position"), None)[0][0, :, 0].tolist()
    score = [float("-inf") if x != x else x for x in call["score"][0, :, 0].tolist()]
    for t, now in enumerate(where):
        if now >= 0:
            seen = [j for j in range(t + 1) if where[j] >= 0]
            best = sorted(seen, key=lambda j: (-score[j], j))[:k]
            assert [j for j in seen if now < evict_at[j]] == sorted(best)


@given(case=scores(), k=st.integers(0, 4), size=st.integers(1, 40))
def test_topk_in_blocks_of_rows_is_the_reference(case: Scores, k: int, size: int) -> None:
    """A CPU searches long sequences a few heads at a time; here short ones too."""
    call = case.tensors()
    where, sequence = placed(call["score"], call.get("position"), call.get("cu_seqlens"))
    with patch.object(import_module("hamblocks_ops.select.topk"), "CACHED_RANKS", size):
        got = select_topk(**call, k=k)
    assert torch.equal(got, reference.topk(call["score"], k, where, sequence).to(torch.int32))


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
    with pytest.raises(
        ValueError, match=r"^capacity: expected at least the 3 tokens .*got 2|got 0"
    ):
        compact(evict_at, capacity=cap)


@given(case=scores(), seed=seeds, spare=st.integers(0, 5))
def test_a_capacity_fills_the_lists_up(case: Scores, seed: int, spare: int) -> None:
    call = case.tensors()
    tokens = call.pop("score").shape[1]
    own = call.get("position", torch.arange(tokens)[None, :, None]).expand(
        case.tensors()["score"].shape
    )
    evict_at = own + Draw(seed).integers(-2, 4, tuple(own.shape))
    tight = compact(evict_at, **call)
    length = tight.index.shape[2]
    wide = compact(evict_at, **call, capacity=length + spare)
    assert torch.equal(wide.lengths, tight.lengths)
    for name, fill in (("index", tokens), ("position", NEVER), ("evict_at", 0)):
        got, expected = getattr(wide, name), getattr(tight, name)
        assert torch.equal(got[..., :length], expected)
        assert bool((got[..., length:] == fill).all())


NAN = float("nan")
SELECT: list[tuple[Any, dict[str, Any]]] = [
    (select_threshold, {"tau": 0.5}),
    (select_topk, {"k": 2}),
    (select_window, {"width": 2}),
    (select_first, {"n": 2}),
]


@pytest.mark.parametrize("packed", [False, True])
def test_everything_is_computed_on_the_device_of_the_inputs(packed: bool) -> None:
    """Not on the default device, which is here one that computes nothing."""
    score = torch.tensor([0.5, 0.9, 0.5, 0.1, 1.0])[None, :, None].repeat(1, 1, 2)
    batch = {"cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32)} if packed else {}
    sequence = torch.tensor([0, 0, 0, 1, 1]) if packed else None
    position = torch.tensor([0, 1, 2, 0, 1] if packed else [0, 1, 2, 3, 4])[None, :, None].repeat(
        1, 1, 2
    )

    def everything() -> list[torch.Tensor]:
        lifetimes = [op(score, **options, **batch) for op, options in SELECT]
        lists = [
            x for capacity in (None, 5) for x in compact(lifetimes[1], capacity=capacity, **batch)
        ]
        return [*lifetimes, *lists, reference.topk(score, 2, position, sequence)]

    expected = everything()
    with torch.device("meta"):
        got = everything()
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


SCORE = torch.zeros(1, 5, 2)
TOLD: list[tuple[Any, str]] = [
    (
        lambda: select_topk(SCORE[0], 2),
        "score: expected shape [B, T, H] = [any, any, any], got float32 [5, 2]",
    ),
    (
        lambda: compact(SCORE[0].int()),
        "evict_at: expected shape [B, T, H] = [any, any, any], got int32 [5, 2]",
    ),
    (
        lambda: select_topk(SCORE, 2, position=torch.zeros(1, 4, dtype=torch.int32)),
        "position: expected shape [B, T] = [1, 5], got int32 [1, 4]",
    ),
    (
        lambda: select_topk(SCORE, 2, position=torch.zeros(1, 5, 3, dtype=torch.int32)),
        "position: expected shape [B, T, H] = [1, 5, 2], got int32 [1, 5, 3]",
    ),
    (
        lambda: select_topk(SCORE, 2, position=torch.zeros(1, 5, dtype=torch.int32, device="meta")),
        "position: expected device cpu, got int32 [1, 5] on meta",
    ),
    (
        lambda: select_topk(
            SCORE, 2, position=torch.zeros(1, 5, 2, dtype=torch.int32, device="meta")
        ),
        "position: expected device cpu, got int32 [1, 5, 2] on meta",
    ),
    (
        lambda: select_topk(SCORE, 2, position=[[0, 1]]),  # type: ignore[arg-type]
        "position: expected a tensor [B, T, H], got list [[0, 1]]",
    ),
    (lambda: select_topk(SCORE, -1), "k: expected an integer >= 0, got int -1"),
    (lambda: select_threshold(SCORE, NAN), "tau: expected a number that is not NaN, got float nan"),
    (
        lambda: select_threshold(SCORE, torch.zeros(3)),
        "tau: expected shape [] or [H] = [2], got float32 [3]",
    ),
    (
        lambda: select_threshold(SCORE, torch.zeros(2, device="meta")),
        "tau: expected device cpu, got float32 [2] on meta",
    ),
    (
        lambda: select_threshold(SCORE, torch.tensor([0.0, NAN])),
        "tau: expected values that are not NaN, got NaN",
    ),
    (
        lambda: compact(torch.full((1, 3, 1), 9), capacity=2),
        "capacity: expected at least the 3 tokens that are stored, got 2",
    ),
]


@pytest.mark.parametrize(("call", "told"), TOLD, ids=[told for _, told in TOLD])
def test_the_message_of_a_bad_argument_in_full(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        call()


def test_tau_is_compared_in_the_wider_of_float32_and_the_dtype_of_the_score() -> None:
    """0.1 in float32 is more than it is in float64, and 0.7 less."""
    assert select_threshold(torch.full((1, 1, 1), 0.1, dtype=torch.float64), 0.1).item() == NEVER
    tau = torch.tensor([0.7], dtype=torch.float64)
    assert select_threshold(torch.full((1, 1, 1), 0.7), tau).item() == NEVER


def test_any_count_is_a_count() -> None:
    score = torch.rand(1, 5, 1)
    for op in (select_topk, select_first, select_window):
        assert (op(score, 10**30) == NEVER).all()


def test_one_tau_is_for_every_head() -> None:
    score = torch.rand(1, 5, 3)
    assert torch.equal(select_threshold(score, torch.tensor([0.5])), select_threshold(score, 0.5))


@pytest.mark.parametrize(
    "tau", [0.3015, torch.tensor(0.3015), torch.tensor([0.3015])], ids=["number", "[]", "[H]"]
)
def test_tau_is_not_rounded_to_the_dtype_of_the_score(tau: float | torch.Tensor) -> None:
    """In bfloat16 tau would be the score itself."""
    score = torch.full((1, 1, 1), 0.30078125, dtype=torch.bfloat16)
    assert select_threshold(score, tau).item() == 0
