"""Selectors: every expression of `|` and `&` obeys the laws that a single selector does, and the two are a lattice."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import AtLeast, GlobalTopK, Smallest

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.selectors import start
from hamblocks.testing import CHECKS, Options, ScorePieces, score_pieces

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


LAWS = [
    check
    for check in CHECKS["selector"]
    if check.name.split("_", 2)[2]
    in {
        "is_causal",
        "any_split_is_one_pass",
        "only_lowers",
        "ledger_does_not_grow",
        "packed_is_one_by_one",
        "padding_is_ignored",
        "or_and_and_are_a_lattice",
        "nothing_given_changes",
        "raising_tau_never_keeps_more",
        "works_in_a_layer",
    }
]


@pytest.mark.parametrize("law", LAWS, ids=str)
@given(tree=TREES, data=st.data())
def test_every_expression_obeys_the_laws_of_a_selector(law, tree, data):
    selector = grow(tree)
    if law.why_not(selector) is None:
        law(selector, data.draw(law.cases(Options())))


@given(a=TREES, b=TREES, c=TREES, case=score_pieces())
@example(a=("top", 2), b=("window", 3), c=("threshold", 0.0), case=ScorePieces())
def test_or_and_and_associate_and_distribute(a, b, c, case):
    def equal(left, right):
        return torch.equal(grow(left)(case.score).evict_at, grow(right)(case.score).evict_at)

    for sign, other in (("|", "&"), ("&", "|")):
        assert equal((sign, a, (sign, b, c)), (sign, (sign, a, b), c))
        assert equal((sign, a, (other, b, c)), (other, (sign, a, b), (sign, a, c)))


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
