from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Draw, Scores, pieces, scores, seeds
from torch import Tensor

from hamblocks_ops import NEVER, compact, select_first, select_threshold, select_topk, select_window

counts = st.one_of(st.sampled_from([0, 1, 2, 2**40]), st.integers(0, 45))


def placed(call: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Position [B, T, H] and sequence [T] of every token, by a loop."""
    batch, tokens, heads = call["score"].shape
    lengths = call["cu_seqlens"].diff().tolist() if "cu_seqlens" in call else [tokens]
    own = torch.tensor([t for n in lengths for t in range(n)], dtype=torch.int64)
    sequence = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    position = call.get("position", own[None, :, None].expand(batch, tokens, heads)).long()
    return position, sequence if "cu_seqlens" in call else None


@given(case=scores(), k=counts)
@example(case=Scores(tokens=0), k=3)
@example(case=Scores(tokens=1, heads=1), k=1)
@example(case=Scores(tokens=65, kind="constant"), k=5)
@example(case=Scores(tokens=64, kind="infinite"), k=0)
@example(case=Scores(tokens=40, kind="ties", empty_rows=True, layout="strided"), k=7)
@example(case=Scores(packed=(0, 5, 0, 0, 33, 1, 0), kind="ties"), k=3)
@example(case=Scores(packed=(0, 5, 0, 33, 1, 0), kind="mixed", empty_rows=True), k=4)
@example(case=Scores(packed=()), k=1)
def test_topk_is_its_definition(case: Scores, k: int) -> None:
    call = case.tensors()
    position, sequence = placed(call)
    expected = import_module("hamblocks_ops.select.reference").topk(call["score"], k, position, sequence)
    got = select_topk(**call, k=k)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), expected)


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


@given(case=scores(dtype=torch.float64), k=st.integers(1, 9))
def test_topk_knows_no_future(case: Scores, k: int) -> None:
    call = case.tensors()
    whole = select_topk(**call, k=k)
    cut = call["score"].shape[1] // 2
    changed = call["score"].clone()
    changed[:, cut:] = Draw(case.seed + 1).normal(*changed[:, cut:].shape)
    other = select_topk(**(call | {"score": changed}), k=k)
    position, sequence = placed(call)
    for own in pieces(case.packed or (call["score"].shape[1],)):
        later = position[:, max(cut, own.start) : own.stop]
        until = later.masked_fill(later < 0, NEVER).amin(1, keepdim=True) if later.shape[1] else NEVER
        early = slice(own.start, min(cut, own.stop))
        clamped = (x[:, early].long().clamp(max=until) for x in (whole, other))
        assert torch.equal(*clamped), sequence


@given(case=scores(), tau=st.one_of(st.sampled_from([float("inf"), float("-inf"), 0.0, -0.0]), st.floats(-2, 2)))
@example(case=Scores(tokens=9, kind="infinite"), tau=float("inf"))
@example(case=Scores(tokens=9, kind="infinite", empty_rows=True), tau=float("-inf"))
def test_threshold_is_its_definition(case: Scores, tau: float) -> None:
    call = case.tensors()
    position, _ = placed(call)
    got = select_threshold(**call, tau=tau)
    assert got.dtype == torch.int32
    score = call["score"].double()
    wide = tau if case.dtype == torch.float64 else float(torch.tensor(tau, dtype=torch.float32))
    kept = (score >= wide) & ~score.isnan() & (position >= 0)
    if tau == float("inf"):
        kept = torch.zeros_like(kept)
    assert torch.equal(got.long(), torch.where(kept, NEVER, position))


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


@given(case=scores(), taus=st.tuples(*[st.floats(allow_nan=False, width=32)] * 2).map(sorted))
def test_raising_tau_never_keeps_more(case: Scores, taus: list[float]) -> None:
    call = case.tensors()
    low, high = (select_threshold(**call, tau=tau) for tau in taus)
    assert bool((high <= low).all())


@given(case=scores(), count=counts)
@example(case=Scores(packed=(0, 4, 0, 6, 0), empty_rows=True), count=3)
@example(case=Scores(tokens=3), count=NEVER)
def test_window_and_first_are_their_definitions(case: Scores, count: int) -> None:
    call = case.tensors()
    position, _ = placed(call)
    there = position >= 0
    window, first = select_window(**call, width=count), select_first(**call, n=count)
    assert window.dtype == first.dtype == torch.int32
    assert torch.equal(window.long(), torch.where(there, (position + count).clamp(max=NEVER), position))
    assert torch.equal(first.long(), torch.where(there & (position < count), NEVER, position))


@given(case=scores(), seed=seeds, spare=st.none() | st.integers(0, 5))
@example(case=Scores(tokens=0), seed=0, spare=None)
@example(case=Scores(batch=0), seed=0, spare=None)
@example(case=Scores(batch=0), seed=0, spare=2)
@example(case=Scores(packed=()), seed=0, spare=1)
@example(case=Scores(packed=(0, 4, 0, 6, 0)), seed=1, spare=0)
def test_compact_lists_what_is_ever_stored(case: Scores, seed: int, spare: int | None) -> None:
    call = case.tensors()
    position, sequence = placed(call)
    tokens = position.shape[1]
    evict_at = position + Draw(seed).integers(-2, 4, tuple(position.shape))
    evict_at = torch.where(evict_at == position + 3, NEVER, evict_at).to(torch.int32)
    placing = {name: x for name, x in call.items() if name != "score"}
    stored = evict_at > position
    longest = int(stored.sum(1).max()) if stored.numel() else 0
    capacity = None if spare is None else longest + spare
    got = compact(evict_at, **placing, capacity=capacity)
    assert all(x.dtype == torch.int32 for x in got)
    length = longest if capacity is None else capacity
    assert got.index.shape == (position.shape[0], position.shape[2], length)
    rows = len(case.packed) if case.packed is not None else position.shape[0]
    counted = torch.zeros(rows, position.shape[2], dtype=torch.int32)
    for b in range(position.shape[0]):
        for h in range(position.shape[2]):
            kept = [t for t in range(tokens) if stored[b, t, h]]
            rest = length - len(kept)
            assert got.index[b, h].tolist() == kept + [tokens] * rest
            assert got.position[b, h].tolist() == position[b, kept, h].tolist() + [NEVER] * rest
            assert got.evict_at[b, h].tolist() == evict_at[b, kept, h].tolist() + [0] * rest
            for t in kept:
                counted[b if sequence is None else int(sequence[t]), h] += 1
    assert torch.equal(got.lengths, counted)


@pytest.mark.parametrize("cap", [0, 2])
def test_compact_refuses_a_capacity_that_is_too_small(cap: int) -> None:
    evict_at = torch.full((1, 3, 1), NEVER, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^capacity: expected at least the 3 tokens .*got 2|got 0"):
        compact(evict_at, capacity=cap)


@given(case=scores())
def test_packed_is_one_by_one(case: Scores) -> None:
    case = Scores(**(case.__dict__ | {"packed": case.packed or (0, 3, 2)}))
    call = case.tensors()
    ops = {
        select_topk: {"k": 2},
        select_threshold: {"tau": 0.0},
        select_window: {"width": 2},
        select_first: {"n": 2},
    }
    for op, options in ops.items():
        whole = op(**call, **options)
        for own in pieces(case.packed):
            alone = {name: x[:, own] for name, x in call.items() if name != "cu_seqlens"}
            assert torch.equal(op(**alone, **options), whole[:, own])


@given(case=scores(), k=st.integers(0, 5))
def test_inputs_stay_and_the_same_call_gives_the_same_bits(case: Scores, k: int) -> None:
    call = case.tensors()
    before = {name: x.clone() for name, x in call.items()}
    one, same = select_topk(**call, k=k), select_topk(**call, k=k)
    assert torch.equal(one, same)
    compact(one, **{name: x for name, x in call.items() if name != "score"})
    assert all(torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, x in call.items())
