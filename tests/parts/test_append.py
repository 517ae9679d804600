"""A token that is written by the short way of decoding on a CPU, as a whole commit writes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hamblocks as hb
from hamblocks.cache import dry_run, extension
from hamblocks.cache.append import append
from hamblocks.ops import NEVER


def steps(cache, tokens, streams, random, *, prompt, bias):
    """The handles after a prompt and after every further token, with random lifetimes."""
    sequences = cache.batch_size
    begin = 0
    for size in (prompt, *[1] * tokens):
        k = torch.randn(sequences, size, 2, 4, generator=random)
        position = torch.arange(begin, begin + size, dtype=torch.int32).expand(sequences, size)
        position = position.clone()
        if size > 1:  # padding
            position[0, -1] = -1
        kind = torch.randint(0, 4, (sequences, size, streams), generator=random)
        lasts = torch.randint(0, 9, (sequences, size, streams), generator=random)
        until = position[..., None] + lasts
        until = torch.where(kind == 0, NEVER, until).masked_fill(position[..., None] < 0, -1)
        step = cache.extend(
            k,
            -k,
            position=position,
            evict_at=until.to(torch.int32),
            logit_bias=torch.randn(sequences, size, streams, generator=random) if bias else None,
        )
        begin += size
        cache = step.commit(torch.full((sequences,), begin, dtype=torch.int32))
        yield cache


@given(
    sequences=st.integers(1, 3),
    streams=st.sampled_from([1, 2]),
    page_size=st.integers(1, 4),
    prompt=st.integers(1, 12),
    tokens=st.integers(1, 12),
    reserved=st.integers(0, 6),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_changes_a_cache_as_a_commit_does(
    sequences, streams, page_size, prompt, tokens, reserved, bias, seed
):
    def run(way):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extension, "append", way)
            cache = hb.KVCache(sequences, page_size=page_size)
            if reserved:
                cache.reserve(reserved)
            random = torch.Generator().manual_seed(seed)
            for now in steps(cache, tokens, streams, random, prompt=prompt, bias=bias):
                own = now._own
                tables = (own.position(), own.lifetimes(), own.table, own.seen)
                yield *tables, own.pool.users, *now.stored(), own.reservation.steps

    short, whole = run(append), run(lambda *_: None)
    for mine, other in zip(short, whole, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_most_tokens_of_a_window_take_the_short_way(monkeypatch):
    taken = []

    def counted(*args):
        taken.append(append(*args))
        return taken[-1]

    monkeypatch.setattr(extension, "append", counted)
    layer = hb.HAMLayer(16, 2, selector=hb.Window(8)).eval()
    x = torch.randn(2, 40, 16)
    with torch.no_grad():
        state = layer.prefill(x[:, :20]).state
        for t in range(20, 40):
            state = layer.decode(x[:, t], state).state
    assert sum(change is not None for change in taken) >= 19


def test_a_planned_token_that_is_dropped_leaves_the_cache_as_it_was():
    cache = hb.KVCache(1, page_size=4)
    random = torch.Generator().manual_seed(0)
    *_, cache = steps(cache, 2, 1, random, prompt=3, bias=False)
    k = torch.ones(1, 1, 2, 4)
    before = cache.stored()
    step = cache.extend(
        k,
        k,
        position=torch.tensor([[5]], dtype=torch.int32),
        evict_at=torch.tensor([[[NEVER]]], dtype=torch.int32),
    )
    with dry_run():
        step.commit(torch.tensor([6], dtype=torch.int32))
    for was, now in zip(before, cache.stored(), strict=True):
        assert was is now is None or torch.equal(was, now)
    assert step.commit(torch.tensor([6], dtype=torch.int32)).tokens.sum() > 0
