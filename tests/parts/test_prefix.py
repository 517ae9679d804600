"""The state of a prompt serves many continuations, and may be saved in between."""

from __future__ import annotations

import io

import pytest
import torch
from parts_cases import CASES, Size, build, close, content, inputs

import hamblocks as hb

PROMPT, MORE, FORKS = 11, 6, 4


def saved_and_loaded(layer, state):
    """A state that went through a file, as another process would load it."""
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return layer.load_state(torch.load(file, weights_only=True))


def prompt_and_continuations(case):
    layer = build(case, Size(0, 1, 0, (4, 2)))
    x = inputs(Size(0, 1, PROMPT, (4, 2)))
    more = inputs(Size(7, FORKS, MORE, (4, 2)))
    with torch.no_grad():
        state = layer.prefill(x, layer.init_state(1, page_size=3)).state
    return layer, x, more, state


def go_on(layer, state, more, begin=0, end=MORE):
    reads = []
    for token in more[begin:end]:
        y, state, _ = layer.decode(token[None], state)
        reads.append(y)
    return torch.cat(reads), state


def check(layer, x, more, state, got):
    """Compares the last state and outputs of a continuation with one pass over all its tokens."""
    history = torch.cat([x, more[None]], 1)
    whole = layer(history)
    close(got, whole.y[0, PROMPT:])
    known = layer.selector(whole.stats.score).evict_at[0].expand(-1, 2)
    for head, (position, evict_at, _) in enumerate(content(state)[0]):
        alive = (known[:, head] > history.shape[1]).nonzero()[:, 0]
        assert position.tolist() == alive.tolist()
        assert torch.equal(evict_at, known[alive, head])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["prompt", "continuations", "both"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_continuations_of_one_prompt_are_what_each_is_alone(case, how):
    layer, x, more, prompt = prompt_and_continuations(case)
    if how != "continuations":
        prompt = saved_and_loaded(layer, prompt)
    forks, halves = [prompt.fork() for _ in range(FORKS)], []
    used = prompt.cache._own.pool.used()
    assert used == int((prompt.cache._own.table >= 0).sum())  # all forks share all pages
    for n in range(FORKS):  # all forks are alive while each goes on
        got, forks[n] = go_on(layer, forks[n], more[n], 0, MORE // 2)
        halves.append(got)
    if how != "prompt":
        forks = [saved_and_loaded(layer, fork) for fork in forks]
    for n in reversed(range(FORKS)):
        got, state = go_on(layer, forks[n], more[n], MORE // 2)
        check(layer, x, more[n], state, torch.cat([halves[n], got]))
    # the prompt is as it was
    got, state = go_on(layer, prompt, more[0])
    check(layer, x, more[0], state, got)


@torch.no_grad()
def test_continuations_as_one_batch():
    layer, x, more, prompt = prompt_and_continuations("shared-error")
    prompt = saved_and_loaded(layer, prompt)
    batch = prompt.fork().reorder(torch.zeros(FORKS, dtype=torch.int64))
    reads = []
    for t in range(MORE):
        y, batch, _ = layer.decode(more[:, t], batch)
        reads.append(y)
    for n in range(FORKS):
        whole = layer(torch.cat([x, more[n : n + 1]], 1))
        close(torch.stack(reads, 1)[n], whole.y[0, PROMPT:])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bytes_apart(case):
    layer, _, more, state = prompt_and_continuations(case)
    _, state = go_on(layer, state, more[0])
    apart, own, pool = state.nbytes_by_part, state.cache._own, state.cache._own.pool
    assert sum(apart) == state.nbytes

    def size_of(tree):
        return sum(x.nbytes for x in hb.state.leaves(tree))

    assert apart.memory == size_of(state.memory)
    assert apart.attention == size_of(state.attention)
    assert apart.ledger == size_of(state.ledger)
    pages = len({page for row in own.table.tolist() for page in row} - {-1})
    of_a_page = 2 * own.pool.heads * 4 * 8 + 8  # keys and values in float64; position, lifetime
    of_a_page += 0 if pool.bias is None else 8
    assert apart.pages == pages * pool.page_size * of_a_page
    assert apart.tables == 4 * (own.table.numel() + 2)
    empty = layer.init_state(3).nbytes_by_part
    assert empty == (0, 0, 0, 0, 12)


def test_a_detached_state_ends_the_graph_and_changes_no_value():
    layer = hb.HAMLayer(16, 2, selector=hb.Threshold(0.9) | hb.Window(3))  # keys are convolved
    x = torch.randn(2, 12, 16)
    state = layer.init_state(2)
    reads = []
    for piece in x.split(4, 1):
        y, state, _ = layer(piece, state=state)
        y.square().sum().backward()  # a second pass through an earlier graph would raise
        state = state.detach()
        reads.append(y.detach())
    torch.testing.assert_close(torch.cat(reads, 1), layer(x).y.detach())
