"""Threads that decode forks of one state get what a single thread gets, bit for bit."""

from __future__ import annotations

import contextvars
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hamblocks as hb

THREADS, FORKS, STEPS, PROMPT, ROUNDS = 8, 2, 16, 21, 2


@pytest.fixture(autouse=True)
def _switch_often():
    """Lets Python change threads between almost any two instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


SELECTORS = {
    "evicts later": lambda: hb.TopK(6) | hb.Window(3),
    "lifetimes known at once": lambda: hb.Threshold(0.8) | hb.Window(5),
}


def layer_of(selector):
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, selector=SELECTORS[selector]())
    return layer.double().eval()


def prompt_of(layer, *, sequences=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sequences, PROMPT, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return layer.prefill(x, layer.init_state(sequences, page_size=2)).state


def continuation(layer, state, seed):
    """Decodes `STEPS` tokens of their own after a state, and returns all outputs."""
    generator = torch.Generator().manual_seed(seed)
    reads = []
    with torch.no_grad():
        for step in range(STEPS):
            if step == STEPS // 2:  # a request may itself branch
                state = state.fork()
            x = torch.randn(1, 16, generator=generator, dtype=torch.float64)
            y, state, _ = layer.decode(x, state)
            reads.append(y)
    return torch.stack(reads), state.cache.tokens


def serve(layer, state, seeds):
    """The requests of one thread, each from a fork of its own."""
    return [continuation(layer, state.fork(), seed) for seed in seeds]


def requests(thread):
    return [100 * thread + n for n in range(FORKS)]


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_threads_with_forks_of_one_prompt_get_what_one_thread_gets(selector):
    layer = layer_of(selector)
    right = [serve(layer, prompt_of(layer), requests(thread)) for thread in range(THREADS)]
    for _ in range(ROUNDS):
        prompt, begin = prompt_of(layer), threading.Barrier(THREADS)

        def work(thread, prompt=prompt, begin=begin):
            begin.wait()
            return serve(layer, prompt, requests(thread))

        with ThreadPoolExecutor(THREADS) as pool:
            got = list(pool.map(work, range(THREADS)))
        for thread, (ours, theirs) in enumerate(zip(got, right, strict=True)):
            for fork, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                where = f"thread {thread}, fork {fork}"
                assert torch.equal(one[1], other[1]), where
                assert torch.equal(one[0], other[0]), where
        # the pages of the requests went back, and no count of users is lost
        own, listed = prompt.cache._own.pool, int((prompt.cache._own.table >= 0).sum())
        assert own.used() == listed
        assert own.users[:-2].sum() == listed
        assert own.promised == 0


def test_a_handle_that_threads_use_at_once_goes_on_for_one_of_them():
    layer = layer_of("evicts later")
    for state in (prompt_of(layer), layer.init_state(1)):  # with a pool, and before the first token
        begin, x = threading.Barrier(THREADS), torch.ones(1, 16, dtype=torch.float64)

        def work(_, state=state, begin=begin, x=x):
            begin.wait()
            with torch.no_grad():
                try:
                    return layer.decode(x, state).state
                except ValueError as error:
                    assert str(error).startswith("state: expected ")  # noqa: PT017
                    return None

        with ThreadPoolExecutor(THREADS) as pool:
            went_on = [result for result in pool.map(work, range(THREADS)) if result is not None]
        assert len(went_on) == 1
        assert int(went_on[0].position) == int(state.position) + 1
        went_on[0].cache.check()


def test_a_transaction_of_one_thread_does_not_hold_back_another():
    layer, x = layer_of("evicts later"), torch.ones(1, 16, dtype=torch.float64)
    prompt = prompt_of(layer)
    with torch.no_grad(), hb.cache_transaction():
        mine = layer.decode(x, prompt.fork()).state
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(continuation, layer, prompt.fork(), 5).result()
    alone = continuation(layer, prompt.fork(), 5)
    assert torch.equal(theirs[0], alone[0])
    assert int(mine.cache.tokens.sum()) > 0


def test_a_task_that_outlives_a_transaction_applies_its_changes():
    layer, x = layer_of("evicts later"), torch.ones(1, 16, dtype=torch.float64)
    with hb.cache_transaction():
        inherited = contextvars.copy_context()
    state = prompt_of(layer)
    with torch.no_grad():
        state = inherited.run(layer.decode, x, state).state
        state = inherited.run(layer.decode, x, state).state
    assert int(state.cache._own.seen) == PROMPT + 2


def speculated(layer, state, seed):
    """Decodes tokens of which some are taken back, and returns all outputs."""
    generator = torch.Generator().manual_seed(seed)
    reads = []
    with torch.no_grad():
        for step in range(STEPS // 2):
            x = torch.randn(1, 3, 16, generator=generator, dtype=torch.float64)
            y, state, _ = layer.prefill(x, state)
            state = state.rollback(step % 3)
            reads.append(y)
    return torch.stack(reads), state.cache.tokens


def decoded_by_a_model(model, states, seed):
    """Decodes tokens of a model, whose layers change their caches in one transaction."""
    generator = torch.Generator().manual_seed(seed)
    reads = []
    with torch.no_grad():
        for _ in range(STEPS // 2):
            tokens = torch.randint(11, (1, 1), generator=generator)
            logits, states, _ = model(tokens, state=states)
            reads.append(logits)
    return torch.stack(reads), states[0].cache.tokens


def of_a_layer():
    layer = layer_of("evicts later")
    x = torch.ones(1, PROMPT, 16, dtype=torch.float64).cumsum(1).sin()
    with torch.no_grad():
        state = layer.prefill(x, layer.init_state(1, page_size=2, rollback=2)).state
    return lambda seed: speculated(layer, state.fork(), seed)


def of_a_model():
    torch.manual_seed(0)
    model = hb.models.Decoder(11, 2, lambda _: layer_of("evicts later")).double().eval()
    with torch.no_grad():
        states = [layer.init_state(1, page_size=2) for layer in model.stack.layers]
        states = model(torch.arange(PROMPT)[None] % 11, state=states).state
    return lambda seed: decoded_by_a_model(model, [one.fork() for one in states], seed)


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_a_layer, of_a_model])
def test_threads_that_roll_back_or_decode_with_a_model(make):
    right = [make()(seed) for seed in range(THREADS)]
    reply, begin = make(), threading.Barrier(THREADS)

    def work(seed):
        begin.wait()
        return reply(seed)

    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(work, range(THREADS)))
    for (ours, stored), (theirs, kept) in zip(got, right, strict=True):
        assert torch.equal(stored, kept)
        assert torch.equal(ours, theirs)
