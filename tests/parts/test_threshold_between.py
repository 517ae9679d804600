"""Where a threshold is placed: strictly between two scores, by its definition and as a property."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hamblocks.controllers import threshold_between

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# few different values, so that ties are common
SCORES = st.one_of(
    st.lists(FLOAT32, min_size=2, max_size=12),
    st.lists(
        st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.0**127, -(2.0**127), 2.0**-149]),
        min_size=2,
        max_size=12,
    ),
)
FRACTIONS = st.floats(0, 1, width=32)


def tau_of(values, fraction):
    return threshold_between(torch.tensor(values), torch.tensor(fraction)).item()


def next_up(x):
    return torch.nextafter(torch.tensor(x), torch.tensor(math.inf)).item()


def cuts(values):
    """By definition: how many scores each threshold between two of them admits."""
    ordered = sorted(values)
    return [len(values) - i for i, (a, b) in enumerate(pairwise(ordered), 1) if next_up(a) < b]


@given(values=SCORES, fraction=FRACTIONS)
@example(values=[0.0, 1.0], fraction=0.5)
@example(values=[2.0**127, 1.5 * 2.0**127, -1.75 * 2.0**127], fraction=0.5)
def test_a_threshold_equals_no_score_and_admits_the_share_nearest_to_the_fraction(values, fraction):
    tau = tau_of(values, fraction)
    assert tau not in values
    kept = sum(x >= tau for x in values)
    if fraction in (0, 1):
        assert tau == (math.inf if fraction == 0 else -math.inf)
        return
    # everything and nothing are thresholds too, for scores between which none stands
    allowed = cuts(values) or [0, len(values)]
    assert kept in allowed
    misses = [abs(n - fraction * len(values)) for n in allowed]
    assert abs(kept - fraction * len(values)) == min(misses)
    if cuts(values):
        ordered = sorted(values)
        below, above = ordered[-kept - 1], ordered[-kept]
        assert below < tau < above
        assert tau == torch.tensor((below + above) / 2, dtype=torch.float32).item()


@given(values=SCORES, fractions=st.lists(FRACTIONS, min_size=2, max_size=5))
def test_a_larger_fraction_never_raises_the_threshold(values, fractions):
    taus = [tau_of(values, fraction) for fraction in sorted(fractions)]
    assert taus == sorted(taus, reverse=True)


@pytest.mark.parametrize(
    ("values", "fraction", "tau"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2.5),
        ([1.0, 2.0, 3.0, 4.0], 0.6, 2.5),  # 2 of 4 is nearer than 3
        ([1.0, 2.0, 3.0, 4.0], 0.625, 1.5),  # both are as near: more is admitted
        ([1.0, 2.0, 3.0, 4.0], 1e-6, 3.5),  # not +inf, from which no step leads back
        ([1.0, 2.0, 3.0, 4.0], 1 - 1e-6, 1.5),
        ([1.0, 1.0, 1.0, 4.0], 0.5, 2.5),  # the smallest score is most of them
        ([1.0, 4.0, 4.0, 4.0], 0.5, 2.5),  # the largest score is most of them
        ([2.0, 2.0, 2.0], 0.5, -math.inf),  # all are equal
        ([2.0, 2.0, 2.0], 0.4, math.inf),
        ([2.0, math.nan], 0.5, -math.inf),  # one score
        ([2.0, math.nan], 0.4, math.inf),
        ([math.nan, math.nan], 0.4, -math.inf),  # none
        ([1.0, next_up(1.0)], 0.9, -math.inf),  # nothing lies between
        ([1.0, next_up(1.0)], 0.1, math.inf),
        ([0.0, 1.0, next_up(1.0), 1.0, 1.0], 0.2, 0.5),  # the only threshold that stands
        ([math.nan, 1.0, 3.0, math.nan], 0.5, 2.0),  # NaN does not count
        ([-math.inf, 1.0, 3.0, math.inf], 0.25, 4.0),  # infinities stand one range outside
        ([-math.inf, 1.0, 3.0, math.inf], 0.75, 0.0),
        ([5.0, math.inf], 0.5, 7.5),  # a range of 0: the score itself
        ([-math.inf, 0.5], 0.5, 0.0),  # or 1, if that is larger
        ([-math.inf, math.inf], 0.5, 0.0),
        ([math.inf, math.inf], 0.7, -math.inf),
        ([1.0, 2.0], 0.0, math.inf),
        ([1.0, 2.0], 1.0, -math.inf),
        ([math.nan, math.nan], 0.0, math.inf),
    ],
)
def test_a_threshold_by_its_definition(values, fraction, tau):
    assert tau_of(values, fraction) == tau
