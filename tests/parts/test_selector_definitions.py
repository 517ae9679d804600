"""Selectors against their definitions, as loops over the tokens of one sequence and head."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.selectors import lower, start
from hamblocks.testing import scores

COUNTS = st.integers(0, 6)


def beats(a, b):
    """Whether (score, token) a ranks before b."""
    return (-a[0], a[1]) < (-b[0], b[1])


def naive_topk(row, k):
    """When k tokens have beaten each token."""
    lived = []
    for j, x in enumerate(row):
        better = [t for t, y in enumerate(row) if beats((y, t), (x, j))]
        lost = [t for t in range(j, len(row)) if sum(i <= t for i in better) >= k]
        lived.append(lost[0] if lost else NEVER)
    return lived


def naive_delayed(row, k, delay):
    """At every time, those compete that came `delay` tokens ago or earlier."""
    lived = [NEVER] * len(row)
    for t in range(len(row) + delay):
        old = sorted((-row[i], i) for i in range(len(row)) if i <= t - delay)
        for _, j in old[k:]:
            lived[j] = min(lived[j], t)
    return lived


def naive_cooldown(inner, n):
    last, lived = -math.inf, []
    for j, end in enumerate(inner):
        admitted = end > j and j - last >= n
        last = j if admitted else last
        lived.append(end if admitted else j)
    return lived


def naive_budget(inner, tokens):
    stored, lived = [], list(inner)
    for t in range(len(inner)):
        stored = [j for j in stored if lived[j] > t]
        if inner[t] > t:
            stored.append(t)
        if len(stored) > tokens:
            lived[stored.pop(0)] = t
    return lived


def naive_lowest(row, inner, tokens):
    """The best tokens that inner admitted; those that ended still compete."""
    stored, lived = [], list(inner)
    for t in range(len(inner)):
        if inner[t] > t:
            stored = sorted([*stored, (-row[t], t)])
        for _, j in stored[tokens:]:
            lived[j] = min(lived[j], t)
        stored = stored[:tokens]
    return lived


def naive_prompt(row, fraction, length):
    """In a prompt that is not complete, a lifetime that ends at `length` is still without end."""
    best = sorted((-x, j) for j, x in enumerate(row[:length]))
    lost = [j for _, j in best[math.ceil(fraction * length) :]]
    return [length if j in lost else NEVER for j in range(len(row))]


def naive_growth(row, places):
    stored, lived = [], [NEVER] * len(row)
    for t, x in enumerate(row):
        stored = sorted([*stored, (-x, t)])
        for _, j in stored[places(t) :]:
            lived[j] = t
        stored = stored[: places(t)]
    return lived


def naive_mass(row, share, capacity):
    """In exact arithmetic, over the scores as `ErrorMass` counts them."""
    most = torch.finfo(torch.float32).max
    row = [Fraction(min(max(x, 0.0), most)) for x in row]
    stored, lived, total = [], [NEVER] * len(row), Fraction(0)
    for t, x in enumerate(row):
        stored, total = sorted([*stored, (-x, t)]), total + x
        prefix, reached = [], Fraction(0)
        for y, j in stored:
            if reached >= Fraction(share) * total or len(prefix) == capacity:
                lived[j] = t
            else:
                prefix.append((y, j))
                reached -= y
        stored = prefix
    return lived


def compare(selector, naive, case, inner=None):
    """One pass gives what `naive(row)` or `naive(row, inner's lifetimes)` gives for every row.

    The kit's checks compare pieces, packed batches and padding with one pass.
    """
    score = case.tensors()["score"]
    got = selector(score).evict_at
    inside = None if inner is None else inner(score).evict_at
    score = score.double().masked_fill(score.isnan(), -math.inf)
    for b in range(score.shape[0]):
        for h in range(score.shape[2]):
            row = score[b, :, h].tolist()
            args = (row,) if inside is None else (row, inside[b, :, h].tolist())
            assert got[b, :, h].tolist() == naive(*args), row


def rows(tokens=24):
    return scores(
        packed=None, empty_rows=False, tokens=st.integers(1, tokens), batch=st.integers(1, 2)
    )


@given(case=rows(), k=COUNTS, delay=st.integers(0, 30))
def test_topk_with_a_delay_lets_tokens_compete_after_the_window(case, k, delay):
    compare(hb.TopK(k, delay), lambda row: naive_delayed(row, k, delay), case)
    if delay == 0:
        compare(hb.TopK(k), lambda row: naive_topk(row, k), case)


def test_a_delayed_lifetime_never_wraps_around():
    score = torch.tensor([1.0, 2.0, 3.0])[None, :, None]
    for delay in (NEVER - 1, NEVER, NEVER + 5, 2**40):
        assert hb.TopK(1, delay)(score).evict_at.flatten().tolist() == [NEVER] * 3
    assert hb.TopK(1, NEVER - 2)(score).evict_at.flatten().tolist() == [NEVER - 1, NEVER, NEVER]


@given(case=rows(), fraction=st.sampled_from([0, 0.25, 0.5, 0.75, 1]), length=st.integers(0, 12))
def test_a_fraction_of_the_prompt_is_kept_from_its_end_on(case, fraction, length):
    compare(
        hb.PromptFraction(fraction, length), lambda row: naive_prompt(row, fraction, length), case
    )


def test_a_fraction_counts_as_it_is_written():
    assert hb.PromptFraction(0.1, 30).count == 3
    assert hb.PromptFraction(0.07, 100).count == 7
    assert hb.PromptFraction(1 / 3, 30).count == 10
    score = torch.arange(5.0)[None, :, None]
    assert hb.PromptFraction(0.3, 5)(score).evict_at.flatten().tolist() == [5, 5, 5, NEVER, NEVER]


@given(
    case=rows(40),
    exponent=st.sampled_from([0.1, 0.5, 0.75, 0.9]),
    scale=st.sampled_from([0.3, 1.0, 2.5]),
    most=st.sampled_from([1, 5, 16, 65536]),
)
def test_growth_drops_the_worst_when_its_places_are_taken(case, exponent, scale, most):
    def places(t):
        # the power of a square or of a fourth power is whole, and math.pow is exact for it
        return min(math.ceil(scale * math.pow(min(t + 1, most), exponent) - 1e-10), most)

    selector = hb.SublinearGrowth(exponent, scale, most)
    compare(selector, lambda row: naive_growth(row, places), case)


@given(case=rows(40), share=st.sampled_from([0, 0.25, 0.5, 0.75, 1]), capacity=st.integers(1, 30))
def test_error_mass_is_the_least_set_that_reaches_the_share(case, share, capacity):
    def rounded(score):  # so that float64 sums are exact
        return (score.clamp(-4, 4) * 64).round() / 64

    class Rounded(torch.nn.Module):
        def forward(self, score):
            return hb.ErrorMass(share, capacity)(rounded(score))

    def naive(row):
        return naive_mass(rounded(torch.tensor(row)).tolist(), share, capacity)

    compare(Rounded(), naive, case)


@given(case=rows(40), share=st.floats(0.05, 0.95))
def test_stored_tokens_carry_the_share_of_all_errors(case, share):
    score = case.tensors()["score"].nan_to_num(0, 3, 0).double()
    evict_at = hb.ErrorMass(share, 100)(score).evict_at
    for t in range(score.shape[1]):
        seen = score[:, : t + 1].clamp(min=0)
        carried = (seen * (evict_at[:, : t + 1] > t)).sum(1)
        assert (carried >= share * seen.sum(1) * (1 - 1e-12)).all()


INNER = [
    hb.Threshold(0.0),
    hb.Threshold(-math.inf),
    hb.Threshold(math.inf),
    hb.Window(4),
    hb.TopK(3),
    hb.TopK(2, 3) | hb.FirstTokens(1),
    hb.TopK(5) & hb.Window(6),
]


@pytest.mark.parametrize("inner", INNER, ids=range(len(INNER)))
@given(case=rows(), n=st.integers(1, 7))
def test_cooldown_refuses_what_comes_too_early(inner, case, n):
    compare(hb.Cooldown(inner, n), lambda _, lived: naive_cooldown(lived, n), case, inner)


@pytest.mark.parametrize("inner", INNER, ids=range(len(INNER)))
@given(case=rows(), tokens=COUNTS)
def test_budget_gives_the_place_of_the_oldest(inner, case, tokens):
    selector = hb.Budget(inner, tokens)
    compare(selector, lambda _, lived: naive_budget(lived, tokens), case, inner)
    selector = hb.Budget(inner, tokens, leaves="lowest")
    compare(selector, lambda row, lived: naive_lowest(row, lived, tokens), case, inner)


@pytest.mark.parametrize("leaves", ["oldest", "lowest"])
@given(case=rows(), tokens=COUNTS, data=st.data())
def test_a_budget_is_never_exceeded(leaves, case, tokens, data):
    inner = data.draw(st.sampled_from(INNER))
    score = case.tensors()["score"]
    evict_at = hb.Budget(inner, tokens, leaves=leaves)(score).evict_at
    for t in range(score.shape[1]):
        assert (evict_at[:, : t + 1] > t).sum(1).le(tokens).all()


@pytest.mark.parametrize("exponent", [0.5, 0.75])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "constant"])
def test_stored_tokens_grow_sublinearly_to_65536(exponent, order):
    """Whatever the scores do, min(t + 1, k(t)) tokens are stored: the slope in log-log is a."""
    tokens = 65536
    rising = torch.arange(tokens, dtype=torch.float64)
    score = {
        "random": torch.rand(tokens, generator=torch.Generator().manual_seed(0)),
        "rising": rising,
        "falling": -rising,
        "constant": torch.zeros(tokens),
    }[order]
    evict_at = hb.SublinearGrowth(exponent)(score[None, :, None]).evict_at.flatten().long()
    change = torch.ones(tokens + 1, dtype=torch.int64)
    change.scatter_add_(0, evict_at.clamp(max=tokens), -torch.ones_like(evict_at))
    stored = change[:tokens].cumsum(0)
    assert stored[::4095].tolist() == [
        math.ceil((t + 1) ** exponent) for t in range(0, tokens, 4095)
    ]
    grown = stored[-1] / stored[tokens // 64 - 1]
    assert math.log(grown, 64) == pytest.approx(exponent, abs=2e-3)


def test_growth_in_pieces_of_every_size_gives_one_pass():
    """The step of one token has a path of its own, and k stays at its largest in the end."""
    selector = hb.SublinearGrowth(0.7, max_tokens=40)
    score = (torch.randn(2, 90, 2, generator=torch.Generator().manual_seed(1)) * 2).round()
    score[0, 7, 0] = math.nan
    whole = selector(score).evict_at
    for sizes in ([1] * 90, [30, 1, 1, 28, 1, 29], [89, 1]):
        lived, position = whole[:, :0], whole[:, :0]
        ledger = start(selector, 2, 2)
        for piece in torch.arange(90, dtype=torch.int32).split(sizes):
            result = selector(score[:, piece], ledger, position=piece.expand(2, -1))
            lived = torch.cat([lower(position, lived, result.lowered), result.evict_at], 1)
            position = torch.cat([position, piece[None, :, None].expand(2, -1, 2)], 1)
            ledger = result.ledger
        assert torch.equal(lived, whole)


def test_times_near_the_end_of_int32_do_not_wrap_around():
    score = torch.ones(1, 4, 1)
    position = torch.arange(NEVER - 4, NEVER, dtype=torch.int64)[None].to(torch.int32)
    for n, kept in ((1, 4), (2, 2), (NEVER, 1), (2**40, 1)):
        got = hb.Cooldown(hb.Threshold(0.5), n)(score, position=position).evict_at
        assert (got == NEVER).sum() == kept
    got = hb.Budget(hb.Threshold(0.5), 2)(score, position=position).evict_at.flatten().tolist()
    assert got == [NEVER - 2, NEVER - 1, NEVER, NEVER]


def test_error_mass_in_pieces_gives_the_bits_of_one_pass():
    """Sums that round differently in another order would decide otherwise here."""
    selector = hb.ErrorMass(0.5, 64)
    score = torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)).double() ** 8
    whole, one = start(selector, 1, 3), start(selector, 1, 3)
    position = torch.arange(200, dtype=torch.int32)[None]
    whole = selector(score, whole, position=position).ledger
    for t in range(200):
        one = selector(score[:, t : t + 1], one, position=position[:, t : t + 1]).ledger
    assert all(torch.equal(*pair) for pair in zip(whole, one, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slots", [0, 3])
def test_the_operator_of_error_mass_is_registered_well(packed, slots):
    from hamblocks.selectors.mass import error_mass

    score = torch.rand(2, 6).double()
    first = torch.tensor([True, False, False, True, False, False]) if packed else None
    stored, total = torch.full((2, slots), -1.0).double(), torch.zeros(2, 1).double()
    args = (score, first, stored, total, total.clone(), 0.5, 3)
    torch.library.opcheck(error_mass, args, test_utils=("test_schema", "test_faketensor"))


@given(
    streams=st.integers(1, 3),
    tokens=st.integers(0, 30),
    slots=st.integers(0, 5),
    packed=st.booleans(),
    share=st.floats(0, 1),
    capacity=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_error_mass_decides_on_every_device_alike(
    streams, tokens, slots, packed, share, capacity, seed
):
    """The heap of a CPU and the loop of other devices: the same tokens, and the same bits."""
    from hamblocks.selectors.mass import by_columns, by_heap

    random = torch.Generator().manual_seed(seed)
    slots = min(slots, capacity)

    def drawn(*size):
        # some equal scores, some 0, and some padding
        scores = torch.rand(*size, generator=random, dtype=torch.float64) ** 8
        coarse = (scores * 4).round() / 4
        kind = torch.randint(0, 4, size, generator=random)
        return torch.where(kind == 0, coarse, scores).masked_fill(kind == 1, -1)

    score, stored = drawn(streams, tokens), drawn(streams, slots)
    first = torch.rand(tokens, generator=random) < 0.2 if packed else None
    held = torch.zeros(streams, 1, dtype=torch.float64)
    for column in stored.unbind(1):
        held = held + column[:, None].clamp(min=0)
    args = (score, first, stored, held, held + 0.125, share, capacity)
    for mine, other in zip(by_heap(*args), by_columns(*args), strict=True):
        assert torch.equal(mine, other)
