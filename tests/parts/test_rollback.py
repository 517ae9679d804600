"""A state that goes back by its last tokens goes on as if it had never seen them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_cases import CASES, SEEDS, Size, build, close, content, pack, same

import hamblocks as hb

PROMPT, RING = 9, 4
SIZE = Size(0, 2, 0, (4, 2))


def draws(seed):
    """Returns a function that draws x `[B, T, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda tokens, batch=2: torch.randn(
        batch, tokens, 16, generator=generator, dtype=torch.float64
    )


def begun(case, draw, rollback=RING):
    layer = build(case, SIZE)
    x = draw(PROMPT)
    state = layer.init_state(2, page_size=3, rollback=rollback)
    return layer, x, layer.prefill(x, state).state


def decoded(layer, state, x):
    """Outputs and decisions of x `[B, T, 16]`, token by token, and the state."""
    results = []
    for token in x.unbind(1):
        y, state, stats = layer.decode(token, state)
        results.append((y, stats))
    return results, state


def equal(one, other):
    """The states hold the same, bit for bit; tokens may lie on other pages of the pool."""
    parts = same(one.trees, other.trees)
    return parts and (one.cache is None or same(one.cache.state_dict(), other.cache.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", ["one token a call", "all in one call"])
@torch.no_grad()
def test_taking_tokens_back_is_never_having_seen_them(case, call):
    draw = draws(1)
    layer, x, state = begun(case, draw)
    shadow, history = state.fork(), x
    for back in (1, RING, 0, 3):
        wrong_ones, right_ones = draw(max(back, 1)), draw(2)
        before = state.fork()
        if call == "all in one call":
            state = layer.prefill(wrong_ones, state).state
        else:
            _, state = decoded(layer, state, wrong_ones)
        if not back:  # nothing is rejected
            _, shadow = decoded(layer, shadow, wrong_ones)
            history = torch.cat([history, wrong_ones], 1)
        rejected, state = state, state.rollback(back)
        assert equal(state, shadow)
        assert back == 0 or equal(state, before)
        assert state.position.tolist() == [history.shape[1]] * 2
        del rejected
        got, state = decoded(layer, state, right_ones)
        right, shadow = decoded(layer, shadow, right_ones)
        assert same(got, right)
        history = torch.cat([history, right_ones], 1)
    whole = layer(history)
    close(got[-1][0], whole.y[:, -1])
    known = layer.selector(whole.stats.score).evict_at.expand(-1, -1, 2)
    for n, heads in enumerate(content(state)):
        for head, (position, evict_at, _) in enumerate(heads):
            alive = (known[n, :, head] > history.shape[1]).nonzero()[:, 0]
            assert position.tolist() == alive.tolist()
            assert torch.equal(evict_at, known[n, alive, head])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_call_with_a_ring_is_a_call_without_one(case):
    draw = draws(2)
    layer, x, state = begun(case, draw)
    plain = layer.prefill(x, layer.init_state(2, page_size=3)).state
    for tokens in (1, 3, RING + 3):
        more = draw(tokens)
        y, state, stats = layer(more, state=state)
        right, plain, right_stats = layer(more, state=plain)
        close(y, right)
        close(stats.score, right_stats.score)
        for name in ("evict_at", "position", "reads"):
            assert same(getattr(stats, name), getattr(right_stats, name)), name
    lengths = [2, RING + 2]
    packed, borders = pack([draw(length, 1)[0] for length in lengths])
    y, state, stats = layer(packed, state=state, cu_seqlens=borders)
    right, plain, right_stats = layer(packed, state=plain, cu_seqlens=borders)
    close(y, right)
    for name in ("evict_at", "position", "reads", "cu_seqlens"):
        assert same(getattr(stats, name), getattr(right_stats, name)), name
    assert state.position.tolist() == plain.position.tolist()
    assert [one.tolist() for row in content(state) for one, _, _ in row] == [
        one.tolist() for row in content(plain) for one, _, _ in row
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_sequence_goes_back_by_its_own_number(case):
    draw = draws(3)
    layer, x, state = begun(case, draw)
    more, after = draw(RING), draw(3)
    _, state = decoded(layer, state, more)
    for numbers in ([1, 3], [0, RING], [2, 2]):
        back = state.rollback(torch.tensor(numbers))
        histories = [
            torch.cat([x[n], more[n, : RING - number]]) for n, number in enumerate(numbers)
        ]
        assert back.position.tolist() == [len(row) for row in histories]
        # what is left of the ring
        left = min(RING - number for number in numbers)
        again = back.rollback(left)
        assert again.position.tolist() == [len(row) - left for row in histories]
        with pytest.raises(ValueError, match=r"^n: expected at most the tokens that are recorded"):
            back.rollback(left + 1)
        got, back = decoded(layer, back, after)
        for n, row in enumerate(histories):
            row = torch.cat([row, after[n]])
            close(got[-1][0][n], layer(row[None]).y[0, -1])
            known = layer.selector(layer(row[None]).stats.score).evict_at[0].expand(-1, 2)
            for head, (position, _, _) in enumerate(content(back)[n]):
                assert position.tolist() == (known[:, head] > len(row)).nonzero()[:, 0].tolist()


@given(seed=SEEDS, case=st.sampled_from(sorted(CASES)), data=st.data())
@settings(max_examples=max(settings().max_examples // 2, 5))
@torch.no_grad()
def test_speculation(seed, case, data):
    """Calls of several tokens, of which some are rejected, with forks and beams in between."""
    draw = draws(seed)
    layer, x, state = begun(case, draw)
    histories = list(x)
    for _ in range(4):
        tokens = data.draw(st.integers(1, RING + 2))
        back = data.draw(st.integers(0, min(tokens, RING)))
        more = draw(tokens, len(histories))
        y, state, _ = layer.prefill(more, state)
        state = state.rollback(back)
        if tokens > back:
            histories = [
                torch.cat([h, m[: tokens - back]]) for h, m in zip(histories, more, strict=True)
            ]
            for n, row in enumerate(histories):
                close(y[n, tokens - back - 1], layer(row[None]).y[0, -1])
        if data.draw(st.booleans()):
            other = state.fork()
            layer.prefill(draw(2, len(histories)), other)  # is no concern of the state's
        if data.draw(st.booleans()):
            index = data.draw(st.lists(st.integers(0, len(histories) - 1), min_size=1, max_size=3))
            state = state.reorder(torch.tensor(index))
            histories = [histories[i] for i in index]
    assert state.position.tolist() == [len(row) for row in histories]


@torch.no_grad()
def test_back_to_before_the_first_token():
    draw = draws(4)
    layer = build("router-and", SIZE)
    x = draw(3)
    state = layer.prefill(x, layer.init_state(2, rollback=RING)).state
    anew = state.rollback(3)
    assert anew.position.tolist() == [0, 0]
    assert anew.memory is None
    y, anew, _ = layer.prefill(x, anew)
    close(y, layer(x).y)
    assert equal(anew.rollback(1), state.rollback(1))
    with pytest.raises(ValueError, match=r"^n: expected the same for all sequences"):
        state.rollback(torch.tensor([3, 1]))


@torch.no_grad()
def test_a_failed_call_leaves_the_state_and_its_ring(monkeypatch):
    draw = draws(5)
    layer, _, state = begun("shared-error", draw)
    more = draw(3)
    kept, calls = state.fork(), itertools.count()
    combine = type(layer.combiner).__call__

    def fails_at_the_third(*args):
        return 1 / 0 if next(calls) == 2 else combine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(type(layer.combiner), "__call__", fails_at_the_third)
        with pytest.raises(ZeroDivisionError):
            layer.prefill(more, state)
    assert equal(state, kept)
    y, after, _ = layer.prefill(more, state)
    with pytest.raises(ValueError, match=r"^state: expected the newest"):
        layer.prefill(more, state)
    assert torch.equal(y, layer.prefill(more, kept).y)
    assert equal(after.rollback(3), after.rollback(3))


@torch.no_grad()
def test_a_transaction_holds_back_a_call_of_several_tokens():
    draw = draws(6)
    layer, _, state = begun("shared-error", draw)
    more, kept = draw(3), state.fork()

    def fails():
        with hb.cache_transaction():
            layer.prefill(more, state)
            with pytest.raises(ValueError, match=r"^state: expected one call"):
                layer.prefill(more, state)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with hb.cache_transaction():
        after = layer.prefill(more, state).state
    assert equal(after.rollback(3), kept)
    before = after.position.tolist()
    layer.explain(more, state=after)
    after.check()
    assert after.position.tolist() == before


@torch.no_grad()
def test_pages_of_a_ring_go_back_to_the_pool():
    draw = draws(7)
    layer, _, state = begun("window", draw)
    used = []
    for _ in range(30):
        state = layer.decode(draw(1)[:, 0], state).state
        used.append(state.cache._own.pool.used())
    assert max(used[10:]) <= max(used[:10]) + 4
    pool = state.cache._own.pool
    state = state.rollback(RING)
    pool.collect()
    listed = int((state.cache._own.table >= 0).sum())
    assert state.ring.states == ()
    assert pool.used() == listed
    assert pool.users[:-2].sum() == listed


@torch.no_grad()
def test_arguments_and_what_drops_the_ring():
    draw = draws(8)
    layer, x, state = begun("window", draw)
    with pytest.raises(ValueError, match=r"^n: expected at most .*\[4, 4\], got 5"):
        state.rollback(5)
    for bad in (-1, 1.5, torch.tensor([1.0, 1.0]), torch.tensor([1])):
        with pytest.raises(ValueError, match=r"^n: "):
            state.rollback(bad)
    with pytest.raises(ValueError, match=r"^n: expected at most"):
        state.rollback(torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match=r"^steps: expected no reservation"):
        state.reserve(3)
    with pytest.raises(ValueError, match=r"^rollback: "):
        layer.init_state(2, rollback=-1)
    with pytest.raises(ValueError, match=r"^n: expected 0 for a state without rollback"):
        layer.prefill(x).state.rollback(1)
    for copied in (state.to("cpu"), layer.load_state(state.state_dict())):
        assert copied.ring.states == ()
        with pytest.raises(ValueError, match=r"^n: expected at most"):
            copied.rollback(1)
        copied = layer.decode(x[:, 0], copied).state
        assert copied.rollback(1).position.tolist() == [PROMPT] * 2
    emptied = layer.reset(state, torch.tensor([True, False]))
    assert emptied.ring.states == ()
    # a checkpoint comes with the ring of its time
    marked = copied.checkpoint()
    later = layer.decode(x[:, 0], marked).state
    assert later.rollback(1).crop(PROMPT + 1).rollback(1).position.tolist() == [PROMPT] * 2
    assert [len(s.checkpoints) for s in (later, later.rollback(1), later.rollback(2))] == [1, 1, 0]


@pytest.mark.parametrize(
    "parts",
    [
        {"attention": None},
        {"memory": None},
        {"memory": None, "selector": hb.FirstTokens(2) | hb.Window(3)},
        {"gate": hb.GivenScore(), "selector": hb.TopK(3)},
    ],
    ids=["no attention", "no memory", "a window", "a given score"],
)
@torch.no_grad()
def test_layers_without_some_parts(parts):
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, **parts).double().eval()
    draw = draws(9)
    x, more, after = draw(PROMPT), draw(RING + 2), draw(2)
    given = draw(PROMPT + RING + 4)[..., :2] if "gate" in parts else None

    def piece(tokens, state, begin):
        score = None if given is None else given[:, begin : begin + tokens.shape[1]]
        return layer(tokens, state=state, given_score=score)

    state = piece(x, layer.init_state(2, page_size=3, rollback=RING), 0).state
    shadow = piece(more[:, :-3], state.fork(), PROMPT).state
    y, state, _ = piece(more, state, PROMPT)
    state = state.rollback(3)
    begin = PROMPT + RING - 1
    assert state.position.tolist() == shadow.position.tolist() == [begin] * 2
    got, right = piece(after, state, begin), piece(after, shadow, begin)
    close(got.y, right.y)
    score = None if given is None else given[:, : begin + 2]
    whole = layer(torch.cat([x, more[:, :-3], after], 1), given_score=score).y
    close(torch.cat([y[:, :-3], got.y], 1), whole[:, PROMPT:])
    mixed = got.state.rollback(torch.tensor([1, 2]))
    assert mixed.position.tolist() == [begin + 1, begin]
