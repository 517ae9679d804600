"""Selectors: expressions of `|` and `&` obey the laws of one selector; `|` and `&` are a lattice."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import AtLeast, GlobalTopK, Smallest

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.protocols import Lifetimes
from hamblocks.selectors import Composable, ignores_score, lower, start
from hamblocks.state import leaves
from hamblocks.testing import CHECKS, Options, ScorePieces, score_pieces

LEAF = {
    "top": hb.TopK,
    "window": hb.Window,
    "first": hb.FirstTokens,
    "threshold": hb.Threshold,
    "smallest": Smallest,
    "at least": AtLeast,
    "late": lambda k: hb.TopK(k, delay=2),
    "prompt": lambda length: hb.PromptFraction(0.5, length),
    "growth": lambda most: hb.SublinearGrowth(0.6, max_tokens=most + 1),
    "mass": lambda capacity: hb.ErrorMass(0.7, capacity + 1),
}
WRAPPED = {
    "cooldown": lambda inner: hb.Cooldown(inner, 2),
    "budget": lambda inner: hb.Budget(inner, 3),
    "lowest": lambda inner: hb.Budget(inner, 2, leaves="lowest"),
}
TAUS = st.sampled_from([-math.inf, -0.5, 0.0, 0.25, 1.0, math.inf])
LEAVES = st.one_of(
    st.tuples(st.sampled_from(["top", "smallest", "late", "growth", "mass"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["window", "first", "prompt"]), st.integers(0, 6)),
    st.tuples(st.sampled_from(["threshold", "at least"]), TAUS),
)
TREES = st.recursive(
    LEAVES,
    lambda side: (
        st.tuples(st.sampled_from("|&"), side, side)
        | st.tuples(st.sampled_from(sorted(WRAPPED)), side)
    ),
    max_leaves=5,
)


def grow(tree):
    """Makes a selector of nested tuples; a user's plain class may stand on either side."""
    if tree[0] in LEAF:
        return LEAF[tree[0]](tree[1])
    if tree[0] in WRAPPED:
        return WRAPPED[tree[0]](grow(tree[1]))
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


@pytest.mark.slow
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
    assert evict_at(hb.FirstTokens(2)) == [never, never, 2, 3, 4, 5]
    # Of equal scores the earlier stays: 0.5 at 2 never enters, 0.9 at 4 pushes out 0.5, and 1.0
    # pushes out the later 0.9.
    assert evict_at(hb.TopK(2)) == [4, never, 2, 3, 5, never]
    assert evict_at(hb.TopK(2) & hb.Window(3)) == [3, 4, 2, 3, 5, 8]
    assert evict_at(hb.TopK(2) | hb.Window(3)) == [4, never, 5, 6, 7, never]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: s | hb.Window(1),
        lambda s: hb.Window(1) & s,
        lambda s: hb.TopK(1) | (hb.FirstTokens(1) & s),
        lambda s: hb.AllOf(s, AtLeast(0.0)),
        lambda s: hb.Cooldown(s, 2),
        lambda s: hb.TopK(1) | hb.Budget(hb.Window(2) & hb.Cooldown(s, 3), 4),
    ],
)
def test_selector_that_needs_the_whole_sequence_is_refused_by_name(wrap):
    with pytest.raises(ValueError, match=r"^selector: expected .*, got .*GlobalTopK"):
        hb.HAMLayer(8, 2, selector=wrap(GlobalTopK()))


def test_only_what_revises_lifetimes_has_a_ledger():
    for selector in (
        hb.Threshold(0.0),
        hb.Window(3),
        hb.FirstTokens(2),
        hb.Threshold(0.0) | hb.Window(3) & hb.FirstTokens(1),
        AtLeast(0),
    ):
        assert start(selector, 2, 2) is None
    assert start(hb.TopK(3) | hb.Window(9), 2, 2).position.shape == (2, 3, 2)
    assert start((hb.TopK(3) | hb.TopK(2)) & hb.Window(9), 2, 2).position.shape == (2, 5, 2)


LEDGERS = [
    hb.TopK(3),
    (hb.TopK(1) | hb.TopK(2)) & hb.Window(4),
    hb.PromptFraction(0.5, 6),
    hb.SublinearGrowth(0.5, max_tokens=9),
    hb.ErrorMass(0.5, 3),
    hb.Cooldown(hb.Window(2), 2),
    hb.Cooldown(hb.TopK(3), 2),
    hb.Budget(hb.TopK(4), 3),
    hb.Budget(hb.Threshold(0.5), 3, leaves="lowest"),
]


class Numbers(Composable):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.rate, self._private = 1, 2, 0.5, 3


def test_the_numbers_of_a_selector_are_in_its_repr():
    assert repr(hb.TopK(3)) == "TopK(k=3)"
    assert repr(hb.TopK(3, delay=2)) == "TopK(k=3, delay=2)"
    assert repr(hb.PromptFraction(0.5, 6)) == "PromptFraction(fraction=0.5, length=6)"
    assert repr(hb.ErrorMass(0.5, 6)) == "ErrorMass(share=0.5, capacity=6)"
    growth = "SublinearGrowth(exponent=0.5, scale=1.0, max_tokens=9)"
    assert repr(hb.SublinearGrowth(0.5, max_tokens=9)) == growth
    assert "n=3" in repr(hb.Cooldown(hb.Window(2), 3))
    assert "tokens=3, leaves='oldest'" in repr(hb.Budget(hb.Window(2), 3))
    assert repr(Numbers()) == "Numbers(first=1, second=2)"


@pytest.mark.parametrize("selector", LEDGERS)
def test_a_ledger_starts_on_the_device_it_is_asked_for(selector):
    ledger = start(selector, 1, 2, torch.device("meta"))
    assert all(x.device.type == "meta" for x in leaves(ledger))


@pytest.mark.parametrize("selector", LEDGERS)
def test_positions_in_a_ledger_are_int32_whatever_they_come_as(selector):
    ledger = start(selector, 1, 2)
    given = torch.arange(5)[None]
    chosen = selector(torch.rand(1, 5, 2), ledger, position=given)
    assert chosen.ledger.position.dtype == torch.int32


@pytest.mark.parametrize("selector", LEDGERS)
def test_an_error_names_what_a_ledger_cannot_take(selector):
    score, ledger = torch.zeros(1, 5, 2), start(selector, 1, 2)
    with pytest.raises(
        ValueError, match=r"^position: expected int32 \[B, T\] beside a ledger, got None$"
    ):
        selector(score, ledger)
    with pytest.raises(ValueError, match=r"^ledger: expected one of k = 3 tokens, got one of 4$"):
        hb.TopK(3)(score, start(hb.TopK(4), 1, 2), position=torch.arange(5)[None])
    borders = torch.tensor([0, 5], dtype=torch.int32)
    pad = r"\(pad pieces to \[N, T, H\] with position -1\)"
    message = rf"^cu_seqlens: expected None beside a ledger {pad}, got a packed batch$"
    with pytest.raises(ValueError, match=message):
        selector(score, ledger, cu_seqlens=borders)


@pytest.mark.parametrize(
    ("selector", "slots"),
    [
        (hb.PromptFraction(0.5, 7), 4),
        (hb.SublinearGrowth(0.5, max_tokens=16), 4),
        (hb.ErrorMass(0.5, 5), 5),
    ],
)
def test_a_ledger_of_another_size_is_refused(selector, slots):
    ledger = start(selector, 1, 2)
    assert ledger.position.shape[1] == slots
    other = type(ledger)(*(torch.cat([x, x[:, :1]], 1) for x in ledger))
    with pytest.raises(ValueError, match=rf"^ledger: expected one of .*{slots} tokens, got one of"):
        selector(torch.zeros(1, 5, 2), other, position=torch.arange(5)[None])


@pytest.mark.parametrize("selector", [*LEDGERS, hb.Budget(hb.Window(2), 0)])
def test_a_piece_without_tokens_changes_nothing(selector):
    score = torch.rand(1, 5, 2)
    ledger = selector(score, start(selector, 1, 2), position=torch.arange(5)[None]).ledger
    for before in (start(selector, 1, 2), ledger):
        after = selector(score[:, :0], before, position=torch.arange(0)[None])
        assert after.evict_at.shape == (1, 0, 2)
        assert all(
            torch.equal(*pair) for pair in zip(leaves(after.ledger), leaves(before), strict=True)
        )


def test_a_wrapper_reads_scores_if_what_it_wraps_does():
    by_place, by_score = hb.Window(2) | hb.FirstTokens(1), hb.Threshold(0.5)
    assert ignores_score(hb.Cooldown(by_place, 2))
    assert ignores_score(hb.Budget(by_place, 2))
    assert not ignores_score(hb.Cooldown(by_score, 2))
    assert not ignores_score(hb.Budget(by_score, 2))
    assert not ignores_score(hb.Budget(by_place, 2, leaves="lowest"))
    hb.HAMLayer(8, 2, gate=None, selector=hb.Budget(hb.Cooldown(by_place, 2), 3))


def test_a_budget_of_bytes_counts_keys_and_values():
    sizes = {"head_dim": 64, "num_kv_heads": 2, "dtype": torch.bfloat16}
    budget = hb.Budget.of_bytes(hb.Window(9), 512 * 100 + 511, leaves="lowest", **sizes)
    assert (budget.tokens, budget.leaves) == (100, "lowest")
    assert hb.Budget.of_bytes(hb.Window(9), 4096, head_dim=64).tokens == 8


def test_lower_replaces_the_lifetimes_that_are_listed():
    position = torch.tensor([-1, 0, 2, 3], dtype=torch.int32)[None, :, None]
    evict_at = torch.tensor([-1, 4, NEVER, 9], dtype=torch.int32)[None, :, None]
    listed = torch.tensor([-1, 2, 3], dtype=torch.int32)[None, :, None]
    changes = Lifetimes(listed, torch.tensor([7, 5, 6], dtype=torch.int32)[None, :, None])
    assert lower(position, evict_at, changes).flatten().tolist() == [-1, 4, 5, 6]
    assert torch.equal(lower(position, evict_at, Lifetimes(listed[:, :0], listed[:, :0])), evict_at)
    assert torch.equal(lower(position, evict_at, None), evict_at)


def test_a_controller_sees_nan_where_there_is_no_token():
    class Watching(torch.nn.Module):
        def forward(self, score):
            self.seen = score
            return 0.5

        def step(self):
            raise AssertionError("a call does not step")

    score, controller = torch.rand(1, 3, 2), Watching()
    selector = hb.Threshold(controller)
    selector(score)
    assert torch.equal(controller.seen, score)
    selector(score, position=torch.tensor([[-1, 0, 1]], dtype=torch.int32))
    assert controller.seen.isnan()[0, :, 0].tolist() == [True, False, False]
    assert torch.equal(controller.seen[:, 1:], score[:, 1:])


def no_step(score):
    return torch.tensor(0.5)


class StepsWithAState:
    def __call__(self, score):
        return torch.tensor(0.5)

    def step(self, x, state):
        return x


class CannotBeCalled:
    def step(self):
        pass


@pytest.mark.parametrize(
    "controller",
    [
        no_step,
        StepsWithAState(),
        CannotBeCalled(),
        torch.tensor(0.5),
        hb.TargetFraction,
        "0.5",
        None,
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_a_threshold_refuses_what_nothing_can_step(controller):
    with pytest.raises(ValueError, match=r"^controller: expected a number or a Controller .*step"):
        hb.Threshold(controller)


@pytest.mark.parametrize("kind", ["int", "float", "float32", "float64", "int64"])
def test_a_number_is_a_fixed_threshold(kind):
    numbers = {"int": 1, "float": 0.5}
    number = numbers[kind] if kind in numbers else getattr(pytest.importorskip("numpy"), kind)(1.5)
    controller = hb.Threshold(number).controller
    assert type(controller) is hb.FixedThreshold
    assert controller.tau == float(number)


@pytest.mark.parametrize(
    "selector", [hb.Threshold(0.5), hb.Window(2), hb.FirstTokens(1), hb.TopK(1)]
)
def test_positions_count_without_a_ledger_too(selector):
    score = torch.tensor([0.9, 0.8, 0.7])[None, :, None]
    padded = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
    got = selector(score, position=padded).evict_at
    assert got.flatten().tolist() == [-1, *selector(score[:, 1:]).evict_at.flatten().tolist()]
