"""Target fractions: convergence from any start, schedules, drawn fractions, one for all layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parts_cases import SEEDS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import hamblocks as hb
from hamblocks.controllers import threshold_between
from hamblocks.controllers.drawn import drawn, keys_of, scores_of
from hamblocks.hashing import mix, unit_hash

DISTRIBUTIONS = {
    "normal": lambda x: x,
    "log-normal": lambda x: (2 * x).exp(),
    "below zero": lambda x: -(2 * x).exp(),
    "cauchy": lambda x: torch.tan(math.pi * (torch.special.ndtr(x) - 0.5)),
    "uniform": torch.special.ndtr,
    "two hills": lambda x: x + 8 * (torch.special.ndtr(x * 37) - 0.5).sign(),
    "cubed": lambda x: x**3,
}


def scores(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(controller, score):
    return (score >= controller.tau).float().mean().item()


def odds(x):
    return x / max(1 - x, 1e-9)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    seed=SEEDS,
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    shift=st.floats(-30, 30),
    fraction=st.floats(0.03, 0.97),
    start=st.one_of(st.none(), st.floats(-1e30, 1e30), st.just(math.inf)),
)
@example(seed=0, kind="cauchy", scale=1.0, shift=0.0, fraction=0.03, start=1e30)
@example(seed=0, kind="log-normal", scale=1.0, shift=0.0, fraction=0.97, start=-1e30)
def test_converges_from_any_start_for_any_distribution(seed, kind, scale, shift, fraction, start):
    def draw(number, *shape):
        return scale * (DISTRIBUTIONS[kind](scores(seed + number, *shape)) + shift)

    # where a heavy tail is thin, a step moves the share little: the slowest starts need 200 steps
    controller = hb.TargetFraction(fraction, rate=0.3)
    if start is not None:
        controller.set_threshold(start)
    shares = []
    held_out = draw(1000, 1, 4000, 1)
    for number in range(320):
        controller(draw(number, 2, 128, 2))
        controller.step()
        assert controller.tau.isfinite()
        shares.append(share(controller, held_out))
    assert sum(shares[256:]) / 64 == pytest.approx(fraction, abs=0.03)
    # once the sample holds no other scores than these, tau is never far: it would be placed anew
    for one in shares[9:48]:
        assert 1 / 8 < odds(one) / odds(fraction) < 8


@given(seed=SEEDS, kind=st.sampled_from(list(DISTRIBUTIONS)), jump=st.floats(-1e3, 1e3))
def test_follows_a_jump(seed, kind, jump):
    controller = hb.TargetFraction(0.25, rate=0.3)
    for number in range(30):
        score = DISTRIBUTIONS[kind](scores(seed + number, 2, 128, 2)) + jump * (number >= 10)
        controller(score)
        controller.step()
    assert share(controller, score) == pytest.approx(0.25, abs=0.12)


@given(
    seed=SEEDS,
    kinds=st.lists(
        st.sampled_from(["normal", "inf", "-inf", "nan", "zero", "huge", "none"]), max_size=12
    ),
    maker=st.sampled_from(["target", "annealed", "elastic"]),
    fraction=st.floats(0, 1),
)
def test_never_nan(seed, kinds, maker, fraction):
    controller = {
        "target": lambda: hb.TargetFraction(fraction),
        "annealed": lambda: hb.AnnealedFraction(fraction, 4),
        "elastic": lambda: hb.ElasticFraction(fraction / 2, fraction, spacing="uniform"),
    }[maker]()
    fill = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, "zero": 0.0, "huge": 3e38}
    for number, kind in enumerate(kinds):
        score = scores(seed + number, 1, 9, 2).float()
        if kind == "none":
            score = score[:, :0]
        elif kind in fill:
            score[:, ::2] = fill[kind]
        controller(score)
        controller.step()
        assert not controller.tau.isnan()
        assert all(buffer.isfinite().all() for buffer in controller.buffers())
    for one in (0.0, 0.4, 1.0):
        controller.set_fraction(one)
        assert not controller.eval().tau.isnan()
        controller.train()


def test_a_target_of_everything_can_be_lowered_by_hand_and_in_training():
    controller = hb.TargetFraction(1.0)
    score = scores(0, 2, 100, 2)
    for _ in range(3):
        controller(score)
        controller.step()
        assert controller.tau == -math.inf
    controller.set_fraction(0.25)
    assert share(controller, score) == pytest.approx(0.25, abs=0.01)
    assert controller.fraction == 1.0
    controller(score)
    controller.step()  # training aims at its target again
    assert controller.tau == -math.inf
    controller.fraction = 0.25
    controller(score)
    controller.step()
    assert share(controller, score) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    "make", [lambda: hb.TargetFraction(0.9), lambda: hb.AnnealedFraction(0.9, 1)]
)
def test_a_fraction_set_before_the_first_score_is_the_target(make):
    controller, score = make(), scores(0, 2, 100, 2)
    controller.set_fraction(0.3)
    assert (controller.fraction, controller.tau) == (0.3, -math.inf)
    assert controller(score) == -math.inf
    controller.step()
    assert share(controller, score) == pytest.approx(0.3, abs=0.01)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^fraction: expected a number"):
            controller.set_fraction(wrong)
        with pytest.raises(ValueError, match=r"^fraction: expected a number"):
            controller.fraction = wrong
    assert controller.fraction == 0.3


@given(seed=SEEDS, target=st.floats(0.1, 0.6), used=st.floats(0, 1))
def test_a_fraction_in_use_is_left_again_by_training(seed, target, used):
    moved, left = hb.TargetFraction(target), hb.TargetFraction(target)
    for number in range(6):
        for controller in (moved, left):
            controller(scores(seed + number, 1, 200, 2))
            controller.step()
    moved.set_fraction(used)
    assert share(moved, moved.sample) == pytest.approx(used, abs=0.003)
    score = scores(seed + 9, 1, 200, 2)
    for controller in (moved, left):
        controller(score)
        controller.step()
    expected = threshold_between(moved.sample, moved.target)
    assert moved.tau == expected
    assert share(moved, score) == pytest.approx(share(left, score), abs=0.2)


@given(
    seed=SEEDS,
    target=st.floats(0.05, 0.95),
    start=st.floats(0.05, 1),
    steps=st.integers(1, 12),
    begin=st.integers(0, 5),
)
@example(seed=0, target=0.25, start=1.0, steps=10, begin=0)
def test_annealing_follows_its_line(seed, target, start, steps, begin):
    controller = hb.AnnealedFraction(target, steps, start=start, begin=begin)
    assert controller.tau == -math.inf
    for taken in range(1, begin + steps + 1):
        controller(scores(seed + taken, 1, 400, 2) + 0.05 * taken)
        controller.step()
        along = start + (target - start) * min(max((taken - begin) / steps, 0), 1)
        if along == 1:
            assert controller.tau == -math.inf
        else:
            assert share(controller, controller.sample) == pytest.approx(along, abs=0.003)
    assert controller.fraction == pytest.approx(target)


def test_after_annealing_tau_moves_as_that_of_a_target_fraction():
    annealed, plain = hb.AnnealedFraction(0.3, 3, rate=0.5), hb.TargetFraction(0.3, rate=0.5)
    for number in range(12):
        score = scores(number, 1, 400, 2)
        for controller in (annealed, plain):
            controller(score)
            controller.step()
        if number == 2:
            plain.load_state_dict({k: v for k, v in annealed.state_dict().items() if k != "taken"})
    assert annealed.tau == plain.tau


@pytest.mark.parametrize("by", ["freeze_at", "freeze"])
def test_a_frozen_threshold_stays(by):
    controller = hb.AnnealedFraction(0.3, 4, freeze_at=6 if by == "freeze_at" else None)
    taus = []
    for number in range(12):
        if by == "freeze" and number == 6:
            controller.freeze()
        controller(scores(number, 1, 400, 2) + 0.1 * number)
        controller.step()
        taus.append(controller.tau.item())
    assert len(set(taus[:6])) == 6
    assert set(taus[5:]) == {taus[5]}
    # the sample goes on, so that a fraction can be set by hand
    controller.set_fraction(0.3)
    assert share(controller, controller.sample) == pytest.approx(0.3, abs=0.003)
    assert controller.tau > taus[5]
    held = controller.tau.item()
    controller(scores(50, 1, 400, 2))
    controller.step()
    assert controller.tau == held
    if by == "freeze":
        controller.unfreeze()
        controller(scores(51, 1, 400, 2))
        controller.step()
        assert controller.tau != held


def unit_by_hand(seed, step):
    def mixed(word):
        word ^= word >> 16
        word = word * 0x85EBCA6B & 0xFFFFFFFF
        word ^= word >> 13
        word = word * 0xC2B2AE35 & 0xFFFFFFFF
        return word ^ (word >> 16)

    return mixed(mixed(seed & 0xFFFFFFFF) ^ step) / 2**32


@given(
    seed=st.integers(0, 2**40),
    low=st.floats(0.01, 0.5),
    high=st.floats(0.5, 1),
    begin=st.integers(0, 4),
    spacing=st.sampled_from(["log_uniform", "uniform"]),
)
def test_elastic_draws_by_a_hash_of_its_steps(seed, low, high, begin, spacing):
    controller = hb.ElasticFraction(low, high, seed=seed, begin=begin, spacing=spacing)
    assert controller(scores(0, 1, 50, 1)) == -math.inf
    for taken in range(1, 8):
        controller(scores(taken, 1, 200, 2))
        controller.step()
        if taken < begin:
            assert controller.tau == -math.inf
            assert controller.drawn_fraction() == 1
            continue
        unit = unit_by_hand(seed, taken)
        expected = (
            low * (high / low) ** unit if spacing == "log_uniform" else low + (high - low) * unit
        )
        assert controller.drawn_fraction().item() == pytest.approx(expected, rel=1e-6)
        assert controller.tau == threshold_between(controller.sample, controller.drawn_fraction())
        assert share(controller, controller.sample) == pytest.approx(expected, abs=0.003)


def test_elastic_draws_fill_their_range():
    for spacing in ("log_uniform", "uniform"):
        controller = hb.ElasticFraction(0.1, 0.9, spacing=spacing)
        controller(scores(0, 1, 9, 1))
        controller.step()
        drawn = []
        for taken in range(1, 2001):
            controller.taken.fill_(taken)
            drawn.append(controller.drawn_fraction().item())
        x = torch.tensor(drawn).double()
        unit = (x / 0.1).log() / math.log(9) if spacing == "log_uniform" else (x - 0.1) / 0.8
        even = torch.linspace(0, 1, 2000, dtype=torch.float64)
        assert (unit.sort().values - even).abs().max() < 0.04  # Kolmogorov-Smirnov


def test_elastic_layers_of_one_seed_draw_the_same_and_a_restart_goes_on():
    first, second, other = (hb.ElasticFraction(seed=seed) for seed in (1, 1, 2))
    for number in range(5):
        for scale, controller in ((1, first), (3, second), (1, other)):
            controller(scale * scores(number, 1, 100, 1))
            controller.step()
    assert first.drawn_fraction() == second.drawn_fraction() != other.drawn_fraction()
    assert first.tau != second.tau
    again = hb.ElasticFraction(seed=1)
    again.load_state_dict(first.state_dict())
    assert again.tau == first.tau
    for controller in (first, again):
        controller(scores(7, 1, 100, 1))
        controller.step()
    assert again.tau == first.tau


def test_elastic_in_eval_is_where_it_was_set():
    controller, score = hb.ElasticFraction(0.1), scores(0, 2, 200, 2)
    held_out = scores(99, 2, 2000, 2)

    def train(count):
        controller.train()
        for number in range(count):
            controller(scores(number, 2, 200, 2) * 2 + 1)
            controller.step()
        controller.eval()

    assert controller.eval()(score) == -math.inf
    train(3)
    assert controller(score) == -math.inf  # high is 1: everything
    controller.set_fraction(0.2)
    train(3)  # which moves the set fraction along with the scores, and not to a drawn one
    assert share(controller, held_out * 2 + 1) == pytest.approx(0.2, abs=0.03)
    assert controller.tau == threshold_between(controller.sample, torch.tensor(0.2))
    controller.set_threshold(0.7)
    train(3)
    assert controller.tau.item() == pytest.approx(0.7)
    controller.set_fraction(0.0)
    assert controller(score) == math.inf
    controller.reset()
    assert controller.eval()(score) == -math.inf
    assert controller.taken == 0


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "low zero": ("low", lambda: hb.ElasticFraction(0.0)),
        "low": ("low", lambda: hb.ElasticFraction(-0.1)),
        "high": ("high", lambda: hb.ElasticFraction(0.5, 0.4)),
        "high NaN": ("high", lambda: hb.ElasticFraction(0.5, math.nan)),
        "seed": ("seed", lambda: hb.ElasticFraction(seed=0.5)),
        "begin": ("begin", lambda: hb.ElasticFraction(begin=-1)),
        "spacing": ("spacing", lambda: hb.ElasticFraction(spacing="normal")),
        "fraction": ("fraction", lambda: hb.AnnealedFraction(1.5, 3)),
        "steps": ("steps", lambda: hb.AnnealedFraction(0.5, 0)),
        "steps float": ("steps", lambda: hb.AnnealedFraction(0.5, 3.0)),
        "start": ("start", lambda: hb.AnnealedFraction(0.5, 3, start=2)),
        "annealed begin": ("begin", lambda: hb.AnnealedFraction(0.5, 3, begin=True)),
        "freeze_at": ("freeze_at", lambda: hb.AnnealedFraction(0.5, 3, freeze_at=0)),
        "rate": ("rate", lambda: hb.AnnealedFraction(0.5, 3, rate=math.inf)),
        "set": ("fraction", lambda: hb.ElasticFraction().set_fraction(2)),
    }.values(),
)
def test_bad_arguments_are_named(name, make):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        make()


def test_one_target_for_the_model_leaves_its_layers_free():
    shared = hb.TargetFraction(0.3)
    low, high = (hb.Threshold(shared) for _ in range(2))
    model = torch.nn.ModuleList([low, high])
    for number in range(3):
        first, second = scores(number, 2, 100, 2), scores(number + 100, 2, 300, 2) + 1.5
        assert torch.equal(low(first).evict_at > 300, first >= shared.tau)
        high(second)
        hb.step_controllers(model)
        every = torch.cat([first.flatten(), second.flatten()])
        if number == 0:
            # the first step places tau among the scores of both layers, by their number
            assert share(shared, every) == pytest.approx(0.3, abs=0.01)
            assert share(shared, first) < 0.1 < 0.35 < share(shared, second)
    assert share(shared, every) == pytest.approx(0.3, abs=0.05)


@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    rows=st.integers(1, 4),
    nans=st.booleans(),
)
def test_a_sample_does_not_depend_on_pieces_and_their_order(seed, sizes, rows, nans):
    tokens, size = 60, 64
    every = torch.randn(sum(sizes), tokens, 2, generator=torch.Generator().manual_seed(seed))
    every = every.round(decimals=1)  # many equal scores
    if nans:
        every[every > 1] = torch.nan
    whole = drawn(keys_of(every), size)
    parts = [drawn(keys_of(part), size) for part in every.split(sizes)]
    assert torch.equal(drawn(torch.cat(parts[::-1]), size), whole)
    found = scores_of(whole)
    valid = every[~every.isnan()]
    if valid.numel() == 0:
        assert found.isnan().all()
    elif valid.numel() <= size:
        # each score stands as often as any other, give or take one
        values, times = valid.unique(return_counts=True)
        counts = torch.tensor([(found == value).sum() for value in values])
        assert ((counts - times * size / valid.numel()).abs() <= times + 1).all()
    else:
        assert not found.isnan().any()
        assert torch.isin(found, valid).all()
    assert torch.equal(found, found.sort().values) or found.isnan().all()


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_is_drawn_evenly(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(16, 4096, 1, generator=generator)
    score[torch.rand(score.shape, generator=generator) < 0.3] = 0.5  # many equal scores
    found = scores_of(drawn(keys_of(score), 4096))
    for value in (0.05, 0.2, 0.4, 0.5, 0.6, 0.9):
        share, wanted = ((x <= value).double().mean().item() for x in (found, score))
        # five standard deviations of an even sample
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 4096) ** 0.5


def test_keys_hold_every_float():
    score = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, 1e-45, -3e38])
    found = scores_of(drawn(keys_of(score.view(1, -1, 1)), 8))
    assert torch.equal(found, score.sort().values)


def test_the_words_of_the_hash_are_all_different():
    words = mix(torch.arange(2**16))
    assert len(words.unique()) == 2**16
    unit = unit_hash(torch.arange(2**16))
    assert unit.min() >= 0
    assert unit.max() < 1
    assert unit.mean().item() == pytest.approx(0.5, abs=0.01)


MAKERS = [lambda: hb.AnnealedFraction(0.3, 3), lambda: hb.ElasticFraction(0.1)]


@pytest.mark.parametrize("make", MAKERS, ids=["annealed", "elastic"])
def test_nothing_waits_for_the_device(make):
    # a tensor of this mode has no values: reading one on the host raises an error
    with FakeTensorMode():
        controller = make()
        for _ in range(2):
            assert controller(torch.randn(2, 9, 2)).shape == ()
            controller.step()


@pytest.mark.parametrize("make", MAKERS, ids=["annealed", "elastic"])
def test_gradient_checkpointing_gives_the_same_tau(make):
    taus = []
    for used in (False, True):
        torch.manual_seed(0)
        layer = hb.HAMLayer(16, 2, selector=hb.Threshold(make()) | hb.Window(2))
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        hb.hook_controllers(optimizer, layer)
        taus.append([])
        for _ in range(4):
            x = torch.randn(2, 30, 16)
            out = checkpoint(layer, x, use_reentrant=False) if used else layer(x)
            out.y.square().mean().backward()
            optimizer.step()
            taus[-1].append(layer.selector.left.controller.tau.item())
    assert taus[0] == taus[1]
    assert len(set(taus[0])) == 4
