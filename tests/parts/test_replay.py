"""A replayed graph of a decode step runs without the host's accounting of pages."""

from __future__ import annotations

import pytest
import torch
from host_graph import HostGraph
from parts_cases import CASES, Size, build, inputs, same

import hamblocks as hb
from hamblocks.state import leaves, tree_map

PROMPT, RESERVED, PAGE = 13, 6, 4
# the window of queries that do not read is read in a copy of the pages
CAPTURED = [case for case in CASES if case not in ("reference", "queries-by-a-router")]


class Graphed:
    """A decode step with fixed addresses: what it gives is copied to where it takes it from."""

    def __init__(self, layer, state, x, monkeypatch):
        self.x, self.y = x.clone(), None
        # forks share the tensors outside of the cache, because no call changes them
        clones = tree_map(torch.clone, state.trees)
        names = "position", "memory", "attention", "ledger"
        state = state._replace(**dict(zip(names, clones, strict=True)))

        def step():
            y, after, _ = layer.decode(self.x, state)
            self.y, self.state = y, after
            for old, new in zip(leaves(state.trees), leaves(after.trees), strict=True):
                old.copy_(new)

        with torch.no_grad(), monkeypatch.context() as patch:
            # argument checks do not read values while torch is compiling, as in a capture
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            self.graph = HostGraph(step)

    def __call__(self, x):
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()


def everything():
    """A layer that never evicts a token, and so needs more pages with every step."""
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, selector=hb.Threshold(float("-inf")))
    return layer.double().eval()


def begun(case, steps=RESERVED):
    """A layer, its inputs, a state with reserved steps, and a fork that shares the pool."""
    size = Size(0, 3, PROMPT + 20, (4, 2))
    layer, x = everything() if case == "everything" else build(case, size), inputs(size)
    with torch.no_grad():
        _, state, _ = layer.prefill(x[:, :PROMPT], layer.init_state(3, page_size=PAGE))
        other = state.fork()
    state.reserve(steps)
    return layer, x, state, other


@pytest.mark.slow
@pytest.mark.parametrize("case", CAPTURED)
def test_replays_within_the_reserve_are_decode_steps(case, monkeypatch):
    layer, x, state, _ = begun(case)
    whole = state.fork()
    whole.reserve(RESERVED)
    state.reserve(RESERVED)
    step = Graphed(layer, state, x[:, PROMPT], monkeypatch)
    got = [step.y.clone()]
    with torch.no_grad():
        right, whole, _ = layer.decode(x[:, PROMPT], whole)
        rights = [right]
        for t in range(PROMPT + 1, PROMPT + RESERVED):
            got.append(step(x[:, t]))
            right, whole, _ = layer.decode(x[:, t], whole)
            rights.append(right)
        assert torch.equal(torch.stack(got), torch.stack(rights))
        step.state.check()
        assert same(step.state.cache.state_dict(), whole.cache.state_dict())
        assert step.state.cache._own.reservation.steps == 0  # the host knows what replays took
        # the host goes on where the replays ended
        y, state, _ = layer.decode(x[:, PROMPT + RESERVED], step.state)
        right, whole, _ = layer.decode(x[:, PROMPT + RESERVED], whole)
    assert torch.equal(y, right)
    assert torch.equal(state.cache.tokens, whole.cache.tokens)


@pytest.mark.parametrize("case", ["everything", "window", "shared-error", "null-sink"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_replay_past_the_reserve_is_an_error_and_touches_no_other_page(case, steps, monkeypatch):
    layer, x, state, other = begun(case, steps)
    kept = other.cache.state_dict()
    step, pool = Graphed(layer, state, x[:, PROMPT], monkeypatch), state.cache._own.pool
    for t in range(PROMPT + 1, PROMPT + steps):
        step(x[:, t])
    step.state.check()
    for t in range(PROMPT + steps, PROMPT + 20):  # past it
        step(x[:, t])
        with pytest.raises(ValueError, match=rf"^reserve: expected at most the {steps} tokens"):
            step.state.check()
    own = step.state.cache._own
    have = (own.table >= 0).sum(1)
    assert (have <= own.reservation.most_pages).all()
    assert (own.lease.table[:, own.width :] == -1).all()
    # the page of zeros, the pages of the fork, and the counts of users are as they should be
    assert not pool.evict_at[-2].any()
    assert same(kept, other.cache.state_dict())
    listed = torch.cat([s.cache._own.table.flatten() for s in (step.state, other)])
    users = torch.bincount(listed[listed >= 0].long(), minlength=pool.pages)
    assert torch.equal(users, pool.users[:-2].long())
    calls = {
        "fork": step.state.fork,
        "state_dict": step.state.state_dict,
        "reserve": lambda: step.state.reserve(4),
        "reorder": lambda: step.state.reorder(torch.tensor([0])),
        "nbytes": lambda: step.state.nbytes,
        "stored": step.state.cache.stored,
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"^reserve: "):
            call()
    with torch.no_grad(), pytest.raises(ValueError, match=r"^reserve: "):
        layer.prefill(x[:, :9], step.state)  # more tokens than the host thinks are reserved
    # sequences that are emptied may be used again
    anew = layer.reset(step.state, torch.tensor([True, True, True]))
    anew.check()


def test_a_sequence_that_is_emptied_has_the_whole_reserve_again(monkeypatch):
    layer, x, state, _ = begun("window")
    with torch.no_grad():
        for t in range(2):
            _, state, _ = layer.decode(x[:, PROMPT + t], state)
        state = layer.reset(state, torch.tensor([False, True, False]))
        step = Graphed(layer, state, x[:, 0], monkeypatch)
        for t in range(1, RESERVED - 2):
            step(x[:, t])
        step.state.check()
        step(x[:, 9])
    with pytest.raises(ValueError, match=r"^reserve: .* got 7 "):
        step.state.check()
    anew = layer.reset(step.state, torch.tensor([True, False, True]))
    anew.check()
    anew = layer.decode(x[:, 0], anew).state
    assert anew.position.tolist() == [1, 6, 1]
