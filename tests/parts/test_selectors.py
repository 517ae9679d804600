"""Selectors: one pass is any split, lifetimes are only lowered, and `|` and `&` are a lattice."""

import math

import hypothesis
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import SEEDS, AtLeast, GlobalTopK, Smallest, cuts, tensors

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.selectors import EMPTY, start

LEAF = {
    "top": hb.TopK,
    "window": hb.Window,
    "first": hb.First,
    "threshold": hb.Threshold,
    "smallest": Smallest,
    "at least": AtLeast,
}
TAUS = st.sampled_from([-math.inf, -0.5, 0.0, 0.25, 1.0, math.inf])
LEAVES = st.one_of(
    st.tuples(st.sampled_from(["top", "smallest"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["window", "first"]), st.integers(0, 6)),
    st.tuples(st.sampled_from(["threshold", "at least"]), TAUS),
)
TREES = st.recursive(LEAVES, lambda side: st.tuples(st.sampled_from("|&"), side, side), max_leaves=5)


def grow(tree):
    """An expression as nested tuples -> a selector; the user's plain classes stand on either side of an operator."""
    if tree[0] in LEAF:
        return LEAF[tree[0]](tree[1])
    sign, left, right = tree[0], grow(tree[1]), grow(tree[2])
    if not any(isinstance(side, torch.nn.Module) for side in (left, right)):
        return {"|": hb.AnyOf, "&": hb.AllOf}[sign](left, right)
    return left | right if sign == "|" else left & right


def draw_scores(seed, rows, tokens, heads, ties):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, tokens, heads, generator=generator)
    return (2 * score).round() / 4 if ties else score


DEEP = ("&", ("|", ("top", 4), ("smallest", 2)), ("|", ("window", 6), ("&", ("top", 3), ("threshold", 0.0))))


@hypothesis.settings(max_examples=max(60, hypothesis.settings().max_examples))
@given(
    tree=TREES,
    seed=SEEDS,
    heads=st.integers(1, 2),
    ties=st.booleans(),
    lengths=st.lists(st.integers(0, 16), min_size=1, max_size=3),
    drawn=st.lists(st.tuples(*[st.integers(0, 16)] * 3), max_size=5),
)
@example(tree=DEEP, seed=0, heads=2, ties=True, lengths=[16, 9], drawn=[(t, t, 0) for t in range(16)])
@example(tree=DEEP, seed=1, heads=1, ties=False, lengths=[16, 0, 3], drawn=[(5, 0, 0), (5, 0, 3), (11, 0, 3)])
@example(tree=("|", ("top", 0), ("at least", 0.0)), seed=2, heads=1, ties=True, lengths=[8], drawn=[(4, 0, 0)])
def test_any_split_is_one_pass(tree, seed, heads, ties, lengths, drawn):
    selector = grow(tree)
    rows = len(lengths)
    score = draw_scores(seed, rows, 16, heads, ties)
    borders = torch.tensor([cuts(length, [cut[n] for cut in drawn]) for n, length in enumerate(lengths)])
    ledger = start(selector, rows, heads)
    sizes = [tensor.shape for tensor in tensors(ledger)]
    evict_at = torch.full((rows, 16, heads), EMPTY, dtype=torch.int32)
    for begin, end in zip(borders.T, borders.T[1:], strict=False):
        index = begin[:, None] + torch.arange(int((end - begin).max()))
        real = index < end[:, None]
        index = index.clamp(max=15)
        position = torch.where(real, index, EMPTY).to(torch.int32)
        before = [tensor.clone() for tensor in tensors(ledger)]
        piece = score.gather(1, index[..., None].expand(-1, -1, heads))
        listed = None if ledger is None else ledger.position
        selection = selector(piece.masked_fill(~real[..., None], 9.0), ledger, position=position)
        assert all(torch.equal(*pair) for pair in zip(before, tensors(ledger), strict=True))
        ledger = selection.ledger
        if selection.lowered is not None:
            assert torch.equal(selection.lowered.position, listed)
            for n, slot, head in (listed != EMPTY).nonzero().tolist():
                token = listed[n, slot, head]
                old, new = evict_at[n, token, head], selection.lowered.evict_at[n, slot, head]
                assert new == old or begin[n] <= new < old
                evict_at[n, token, head] = new
        for n in range(rows):
            evict_at[n, begin[n] : end[n]] = selection.evict_at[n, real[n]]
            # not only at the end: after every piece it is one pass over what was seen
            known = selector(score[n : n + 1, : end[n]]).evict_at
            assert torch.equal(evict_at[n : n + 1, : end[n]], known)
    assert [tensor.shape for tensor in tensors(ledger)] == sizes, "a ledger does not grow with the sequence"


@given(tree=TREES, seed=SEEDS, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), ties=st.booleans())
@example(tree=DEEP, seed=0, lengths=[0, 9, 0, 1], ties=True)
def test_packed_is_one_by_one(tree, seed, lengths, ties):
    selector = grow(tree)
    score = draw_scores(seed, 1, sum(lengths), 2, ties)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = selector(score, cu_seqlens=borders).evict_at
    alone = [selector(row).evict_at for row in score.split(lengths, 1)]
    assert torch.equal(packed, torch.cat(alone, 1))


@given(tree=TREES, seed=SEEDS, t=st.integers(0, 12), ties=st.booleans())
@example(tree=DEEP, seed=0, t=7, ties=True)
def test_causal(tree, seed, t, ties):
    selector, score = grow(tree), draw_scores(seed, 1, 12, 2, ties)
    changed = torch.cat([score[:, :t], draw_scores(seed + 1, 1, 12 - t, 2, ties)], 1)
    before, after = (selector(x).evict_at[:, :t].clamp(max=t) for x in (score, changed))
    assert torch.equal(before, after)


@given(a=TREES, b=TREES, c=TREES, seed=SEEDS, ties=st.booleans())
@example(a=("top", 2), b=("window", 3), c=("threshold", 0.0), seed=0, ties=True)
def test_or_and_and_are_a_lattice(a, b, c, seed, ties):
    score = draw_scores(seed, 2, 12, 2, ties)

    def equal(left, right):
        return torch.equal(grow(left)(score).evict_at, grow(right)(score).evict_at)

    for sign, other in (("|", "&"), ("&", "|")):
        assert equal((sign, a, b), (sign, b, a))
        assert equal((sign, a, (sign, b, c)), (sign, (sign, a, b), c))
        assert equal((sign, a, a), a)
        assert equal((sign, a, (other, a, b)), a)
        assert equal((sign, a, (other, b, c)), (other, (sign, a, b), (sign, a, c)))
    alone = grow(a)(score).evict_at
    assert (grow(("|", a, b))(score).evict_at >= alone).all()
    assert (grow(("&", a, b))(score).evict_at <= alone).all()


@given(seed=SEEDS, low=st.floats(-3, 3), high=st.floats(-3, 3))
@example(seed=0, low=-math.inf, high=math.inf)
def test_raising_tau_never_keeps_more(seed, low, high):
    score = draw_scores(seed, 2, 12, 2, True)
    low, high = sorted((low, high))
    assert (hb.Threshold(high)(score).evict_at <= hb.Threshold(low)(score).evict_at).all()


def test_leaves_by_their_definition():
    score = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.9, 1.0])[None, :, None]

    def evict_at(selector):
        return selector(score).evict_at[0, :, 0].tolist()

    never = NEVER
    assert evict_at(hb.Threshold(0.5)) == [never, never, never, 3, never, never]
    assert evict_at(hb.Window(2)) == [2, 3, 4, 5, 6, 7]
    assert evict_at(hb.First(2)) == [never, never, 2, 3, 4, 5]
    # ties go to the earlier token: 0.5 at 2 never enters, 0.9 at 4 pushes out 0.5, 1.0 the later 0.9
    assert evict_at(hb.TopK(2)) == [4, never, 2, 3, 5, never]
    assert evict_at(hb.TopK(2) & hb.Window(3)) == [3, 4, 2, 3, 5, 8]
    assert evict_at(hb.TopK(2) | hb.Window(3)) == [4, never, 5, 6, 7, never]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: s | hb.Window(1),
        lambda s: hb.Window(1) & s,
        lambda s: hb.TopK(1) | (hb.First(1) & s),
        lambda s: hb.AllOf(s, AtLeast(0.0)),
    ],
)
def test_selector_that_needs_the_whole_sequence_is_refused_by_name(wrap):
    with pytest.raises(ValueError, match=r"^selector: expected .*, got .*GlobalTopK"):
        hb.HAMLayer(8, 2, selector=wrap(GlobalTopK()))


def test_only_what_revises_lifetimes_has_a_ledger():
    for selector in (
        hb.Threshold(0.0),
        hb.Window(3),
        hb.First(2),
        hb.Threshold(0.0) | hb.Window(3) & hb.First(1),
        AtLeast(0),
    ):
        assert start(selector, 2, 2) is None
    assert start(hb.TopK(3) | hb.Window(9), 2, 2).position.shape == (2, 3, 2)
    assert start((hb.TopK(3) | hb.TopK(2)) & hb.Window(9), 2, 2).position.shape == (2, 5, 2)


def test_packed_beside_a_ledger_is_refused():
    selector = hb.TopK(2)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected None"):
        selector(torch.zeros(1, 3, 1), selector.start(1, 1), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^position: expected int32"):
        selector(torch.zeros(1, 3, 1), selector.start(1, 1))
    with pytest.raises(ValueError, match=r"^ledger: expected one of k = 2"):
        selector(torch.zeros(1, 3, 1), hb.TopK(3).start(1, 1), position=torch.arange(3)[None])
