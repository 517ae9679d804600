"""Decoding by replays of one step: what is counted on the host, and what a replay may not do."""

from __future__ import annotations

import pytest
import torch
from host_graph import captured
from parts_cases import CASES, Size, build, inputs, same

import hamblocks as hb
from hamblocks import graphed

PROMPT, STEPS, PAGE = 13, 6, 4
# the window of queries that do not read is read in a copy of the pages
REPLAYED = [case for case in CASES if case not in ("reference", "queries-by-a-router")]


@pytest.fixture(params=["eager", "captured"])
def device(request, monkeypatch):
    """As on a device without graphs, and as on one with them."""
    if request.param == "captured":
        monkeypatch.setattr(graphed, "capture_on", lambda _: captured)
    return request.param


def begun(case):
    """A layer, its inputs, and the same state twice, in pools of their own."""
    size = Size(0, 3, PROMPT + 20, (4, 2))
    layer, x = build(case, size), inputs(size)
    with torch.no_grad():
        states = [
            layer.prefill(x[:, :PROMPT], layer.init_state(3, page_size=PAGE)).state
            for _ in range(2)
        ]
    return layer, x, *states


def check_steps(case):
    layer, x, state, plain = begun(case)
    step = layer.graphed_decode(state, STEPS)
    plain.reserve(STEPS)
    for t in range(PROMPT, PROMPT + STEPS):
        with torch.no_grad():
            y, plain, _ = layer.decode(x[:, t], plain)
        assert torch.equal(step(x[:, t]), y)
        assert step.left == PROMPT + STEPS - 1 - t
        if step.state.cache is not None:
            step.state.check()
            assert step.state.cache._own.reservation.steps == step.left
    assert same(step.state.state_dict(), plain.state_dict())
    return layer, x, step, plain


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLAYED)
def test_replays_are_decode_steps_of_every_part(case, monkeypatch):
    monkeypatch.setattr(graphed, "capture_on", lambda _: captured)
    check_steps(case)


def test_steps_are_decode_steps_and_the_state_goes_on(device):
    layer, x, step, plain = check_steps("window")
    with torch.no_grad():
        y, state, _ = layer.decode(x[:, PROMPT + STEPS], step.state)
        right, plain, _ = layer.decode(x[:, PROMPT + STEPS], plain)
    assert torch.equal(y, right)
    assert same(state.state_dict(), plain.state_dict())


def test_the_step_after_the_last_is_an_error_that_changes_nothing(device):
    _, x, step, _ = check_steps("window")
    before = step.state.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^reserve: expected at most the 6 steps .* got 7"):
            step(x[:, 0])
    assert same(step.state.state_dict(), before)


def test_every_step_spends_the_states_before_it(device):
    layer, x, state, _ = begun("window")
    step = layer.graphed_decode(state, STEPS)
    for t in range(4):
        earlier = step.state
        step(x[:, PROMPT + t])
        with torch.no_grad(), pytest.raises(ValueError, match=r"^state: expected the newest"):
            layer.decode(x[:, 0], earlier)
    # and a call that goes on elsewhere ends the steps
    with torch.no_grad():
        after = layer.decode(x[:, 0], step.state).state
    kept, left = after.state_dict(), step.left
    with pytest.raises(ValueError, match=r"^state: expected the newest"):
        step(x[:, 1])
    assert same(after.state_dict(), kept)
    assert step.left == left


def test_a_fork_ends_the_reservation(device):
    layer, x, state, _ = begun("window")
    step = layer.graphed_decode(state, STEPS)
    for t in range(3):
        step(x[:, PROMPT + t])
    fork = step.state.fork()
    kept = fork.state_dict()
    with pytest.raises(ValueError, match=r"^reserve: expected a reserved step, got none"):
        step(x[:, 0])
    assert same(fork.state_dict(), kept)
    # with pages of its own again, the state goes on
    again = layer.graphed_decode(step.state, STEPS)
    for t in range(3):
        again(x[:, t])
    assert same(fork.state_dict(), kept)


def test_a_pool_that_grows_is_captured_again(device):
    """A fork of before grows the pool, whose tensors are then others."""
    layer, x, state, plain = begun("window")
    fork = state.fork()
    step = layer.graphed_decode(state, STEPS)
    plain.reserve(STEPS)
    version = step.state.cache.pool_version
    for t in range(PROMPT, PROMPT + STEPS):
        if t == PROMPT + 3:
            fork.reserve(500)
            assert step.state.cache.pool_version > version
        with torch.no_grad():
            y, plain, _ = layer.decode(x[:, t], plain)
        assert torch.equal(step(x[:, t]), y)
    step.state.check()


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch):
    layer, x, state, plain = begun("window")

    def failing(step):
        captured(step)
        raise RuntimeError("no capture")

    def decodes(t):
        nonlocal plain
        with torch.no_grad():
            right, plain, _ = layer.decode(x[:, t], plain)
        return torch.equal(step(x[:, t]), right)

    monkeypatch.setattr(graphed, "capture_on", lambda _: captured)
    step = layer.graphed_decode(state, STEPS)
    plain.reserve(STEPS)
    assert decodes(PROMPT)
    before, left = step.state.state_dict(), step.left
    monkeypatch.setattr(graphed, "capture_on", lambda _: failing)
    with pytest.raises(RuntimeError, match="no capture"):
        step(x[:, PROMPT + 1])
    assert same(step.state.state_dict(), before)
    assert (step.left, step.state.cache._own.reservation.steps) == (left, left)
    monkeypatch.setattr(graphed, "capture_on", lambda _: captured)
    assert all(decodes(t) for t in range(PROMPT + 1, PROMPT + STEPS))


@pytest.mark.parametrize("case", ["memory alone", "attention alone"])
def test_layers_without_a_part(case, device):
    torch.manual_seed(0)
    without = {"attention": None} if case == "memory alone" else {"memory": None}
    layer = hb.HAMLayer(16, 2, **without).double().eval()
    x = torch.randn(3, STEPS, 16, dtype=torch.float64)
    step, plain = layer.graphed_decode(layer.init_state(3), STEPS), layer.init_state(3)
    plain.reserve(STEPS)
    for t in range(STEPS):
        with torch.no_grad():
            y, plain, _ = layer.decode(x[:, t], plain)
        assert torch.equal(step(x[:, t]), y)
    with pytest.raises(ValueError, match=r"^reserve: "):
        step(x[:, 0])


def test_a_decoder_replays_all_its_layers(device):
    torch.manual_seed(0)

    def layer(_):
        return hb.HAMLayer(16, 2, selector=hb.Threshold(0.8) | hb.Window(4))

    model = hb.Decoder(11, 3, layer).double().eval()
    tokens = torch.randint(11, (2, 9 + STEPS))
    with torch.no_grad():
        states = [model(tokens[:, :9], state=model.init_state(2)).state for _ in range(2)]
    step, plain = model.graphed_decode(states[0], STEPS), states[1]
    for one in plain:
        one.reserve(STEPS)
    for t in range(9, 9 + STEPS):
        with torch.no_grad():
            logits, plain, _ = model(tokens[:, t : t + 1], state=plain)
        assert torch.equal(step(tokens[:, t]), logits[:, 0])
    with pytest.raises(ValueError, match=r"^reserve: "):
        step(tokens[:, 0])


def test_bad_arguments(device):
    layer, x, state, _ = begun("window")
    for steps in (0, 1.5):
        with pytest.raises(ValueError, match=r"^steps: "):
            layer.graphed_decode(state, steps)
    with pytest.raises(ValueError, match=r"^state: expected a HAMState"):
        layer.graphed_decode(None, 3)
    with pytest.raises(ValueError, match=r"^steps: expected no reservation"):
        layer.graphed_decode(layer.init_state(3, rollback=2), 3)
    step = layer.graphed_decode(state, STEPS)
    step(x[:, 0])
    left = step.left
    for bad in (x[:2, 0], x[:, 0].to(torch.int64), x[:, :1]):
        with pytest.raises(ValueError, match=r"^(x|state): expected"):
            step(bad)
    assert step.left == left
    step(x[:, 1])
