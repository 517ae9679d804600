"""Kernels that store one token per stream leave what the torch ops of a commit leave, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launched import without_values
from torch.nn.functional import pad

import hamblocks as hb
from hamblocks.protocols import Lifetimes
from hamblocks_ops import NEVER
from hamblocks_ops.dispatch import always

append = import_module("hamblocks_ops.append")
kernels = import_module("hamblocks_ops.append.triton")
HEADS, DIM = 2, 3


def tokens(draw, cache, sequences, streams, bias, now):
    """One token per sequence: keys, values and what was decided, at random."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    k, v = torch.randn(2, sequences, 1, HEADS, DIM, generator=random).unbind()
    end = torch.randint(0, 12, (sequences, 1, streams), generator=random, dtype=torch.int32)
    position = torch.full((sequences, 1), now, dtype=torch.int32)
    evict_at = torch.where(end < 5, now + 2 * end, NEVER).to(torch.int32)
    given = {"position": position, "evict_at": evict_at}
    if bias:
        given["logit_bias"] = torch.randn(sequences, 1, streams, generator=random)
    if draw(st.booleans()) and now > 1:
        where = torch.randperm(now, generator=random)[: now // 2].sort().values.to(torch.int32)
        where = where[None, :, None].expand(sequences, -1, streams)
        given["lowered"] = Lifetimes(where, torch.full_like(where, now))
    return k, v, given


def tables(cache):
    """Everything that a commit writes, but what masked writes leave in the scratch page."""
    own, pool = cache._own, cache._own.pool
    spanning = [pool.position, pool.evict_at, *([] if pool.bias is None else [pool.bias])]
    slabs = [x[:-1] for pair in pool.keys for x in pair]
    counts = own.reservation.steps, own.turn, own.width
    return [
        own.lease.table, pool.users[:-1], own.seen, *(x[:-1] for x in spanning), *slabs
    ], counts  # fmt: skip


def shown_to_attention(made: Any) -> torch.Tensor:
    """Lifetimes of the pages that the page table lists; no others are read."""
    slabs, table, _ = made._pages()
    lifetimes = [slab.evict_at.flatten(1) for slab in slabs]
    widest = max(x.shape[1] for x in lifetimes)
    pages = torch.cat([pad(x, [0, widest - x.shape[1]]) for x in lifetimes])
    return pages[table.clamp(min=0).long()].where(table[..., None] >= 0, 0)


@settings(phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data())
def test_leaves_what_a_commit_leaves(data: st.DataObject) -> None:
    sequences, streams = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, HEADS]))
    page, bias = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.booleans())
    caches = [hb.KVCache(sequences, page_size=page) for _ in range(2)]
    scanned = data.draw(st.sampled_from([4, 1024]))  # slots, or pages, that are looked at together
    first, steps = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    k, v = torch.randn(2, sequences, first, HEADS, DIM, generator=random).unbind()
    position = torch.arange(first, dtype=torch.int32).expand(sequences, -1)
    ends = torch.randint(0, 2 * first, (sequences, first, streams), generator=random)
    given = {"position": position, "evict_at": ends.to(torch.int32)}
    if bias:
        given["logit_bias"] = torch.randn(sequences, first, streams, generator=random)
    seen = torch.full((sequences,), first, dtype=torch.int32)
    caches = [cache.extend(k, v, **given).commit(seen) for cache in caches]
    for cache in caches:
        cache.reserve(2)
        cache.reserve(steps)  # slabs come apart where the pool has to grow
    for step in range(steps + 2):  # two more than reserved, as a replayed graph may run
        k, v, given = tokens(data.draw, caches[0], sequences, streams, bias, first + step)
        shown: list[torch.Tensor] = []
        for index, refuses in enumerate((always, lambda _: "no")):
            own = caches[index]._own
            own.reservation.steps = max(1, own.reservation.steps)
            with (
                without_values(),
                patch.object(append, "interpreted", refuses),
                patch.object(kernels, "SCANNED", scanned),
            ):
                before = [x.clone() for x in tables(caches[index])[0]]
                made = caches[index].extend(k, v, **given)
                shown.append(shown_to_attention(made))
                # nothing changes before the commit: an error until then leaves the cache whole
                for one, other in zip(tables(caches[index])[0], before, strict=True):
                    assert torch.equal(one, other)
                caches[index] = made.commit(torch.full_like(seen, first + step + 1))
        (got, counts), (right, others) = map(tables, caches)
        assert counts == others
        assert torch.equal(*shown)  # before the commit
        for one, other in zip(got, right, strict=True):
            assert torch.equal(one, other)


def test_the_kernels_ran() -> None:
    """What the test above compares are the kernels, not the same torch ops twice."""
    cache = hb.KVCache(2)
    x, ends = torch.zeros(2, 1, 2, 4), torch.full((2, 1, 2), NEVER, dtype=torch.int32)
    for step in range(2):
        seen = torch.full((2,), step + 1, dtype=torch.int32)
        given = {"position": seen[:, None] - 1, "evict_at": ends}
        with (
            without_values(),
            patch.object(append, "interpreted", always),
            patch.object(kernels, "launch", wraps=kernels.launch) as ran,
        ):
            cache = cache.extend(x, x, **given).commit(seen)
        assert ran.call_count == step
        cache.reserve(4)
    assert cache.tokens.tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("runs", [False, True])
def test_a_shared_page_needs_a_commit(runs: bool) -> None:
    cache = hb.KVCache(1)
    x, ends = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), NEVER, dtype=torch.int32)
    seen = torch.ones(1, dtype=torch.int32)
    cache = cache.extend(x, x, position=seen[:, None] - 1, evict_at=ends).commit(seen)
    fork = cache.fork()
    before = fork.state_dict()
    with without_values(), patch.object(append, "interpreted", always if runs else lambda _: "no"):
        cache.extend(x + 1, x, position=seen[:, None], evict_at=ends).commit(seen + 1)
    assert all(torch.equal(x, before[n]) for n, x in fork.state_dict().items() if n in "kv")
