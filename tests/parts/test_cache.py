"""The KV cache against plain dicts: content, pages and bytes after random sequences of calls."""

import copy
import gc
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from parts_cases import close, same
from torch._subclasses.fake_tensor import FakeTensorMode

import hamblocks as hb
from hamblocks.ops import NEVER, UnsupportedError, selected_attention


class Token(NamedTuple):
    name: int  # determines its key, value and bias
    evict_at: int


def keys_of(name, heads, dim):
    """k and v of a token, `[heads, dim]` each, and its bias."""
    k = name + 0.25 * torch.arange(heads * dim, dtype=torch.float64).view(heads, dim) / (
        heads * dim
    )
    return k, -k, float(name) / 7


class Plain:
    """The oracle of a cache.

    Attributes:
        seen: number of tokens seen, per sequence.
        rows: stored tokens by position, one dict per sequence and stream.
    """

    def __init__(self, sequences, heads):
        self.seen = [0] * sequences
        self.rows = [[{} for _ in range(heads)] for _ in range(sequences)]

    def evict(self):
        for seen, rows in zip(self.seen, self.rows, strict=True):
            for row in rows:
                for position in [p for p, token in row.items() if token.evict_at <= seen]:
                    del row[position]


class Handle:
    def __init__(self, cache, plain):
        self.cache, self.plain = cache, plain


def pool_of(cache):
    """The page pool of a cache; None before the first token."""
    return getattr(cache._own, "pool", None)


def is_spent(cache):
    try:
        cache.check()
    except ValueError as error:
        return "expected the newest" in str(error)
    return False


class Caches(RuleBasedStateMachine):
    handles = Bundle("handles")

    @initialize(
        target=handles,
        sequences=st.integers(0, 3),
        heads=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
        bias=st.booleans(),
        page_size=st.integers(1, 4),
    )
    def start(self, sequences, heads, bias, page_size):
        self.heads, self.wide = heads
        self.bias, self.page_size, self.names = bias, page_size, 0
        self.live = []
        cache = hb.KVCache(sequences, page_size=page_size)
        assert cache.sizes is None
        return self.keep(Handle(cache, Plain(sequences, self.heads)))

    def keep(self, handle):
        self.live.append(handle)
        return handle

    def change(self, handle, data, *, lowered=True):
        """Extends the cache and a copy of its oracle by up to 9 tokens.

        Returns:
            The extension, which is not committed yet, the tokens seen after it, and the oracle.
        """
        cache, plain = handle.cache, copy.deepcopy(handle.plain)
        sequences = len(plain.seen)
        changes = None
        if lowered and sequences and data.draw(st.booleans(), "lowers"):
            changes = self.lower(plain, data)
        tokens = data.draw(st.sampled_from([0, 1, 1, 1, 2, 5, 9]), "tokens")
        k = torch.zeros(sequences, tokens, self.heads * self.wide, 2, dtype=torch.float64)
        v, bias = k.clone(), torch.zeros(sequences, tokens, self.heads * self.wide)
        position = torch.full((sequences, tokens), -1, dtype=torch.int32)
        evict_at = torch.full((sequences, tokens, self.heads), -1, dtype=torch.int32)
        for n in range(sequences):
            own = data.draw(st.integers(0, tokens), "own")
            evict_at[n, own:] = data.draw(st.sampled_from([-1, NEVER]), "padding")
            lives = data.draw(
                st.lists(
                    st.sampled_from([0, 1, 2, 4, NEVER]),
                    min_size=own * self.heads,
                    max_size=own * self.heads,
                ),
                "lives",
            )
            for t in range(own):
                where = plain.seen[n] + t
                position[n, t] = where
                self.names += 1
                for h in range(self.heads):
                    until = min(where + lives[t * self.heads + h], NEVER)
                    evict_at[n, t, h] = until
                    part = slice(h * self.wide, (h + 1) * self.wide)
                    k[n, t, part], v[n, t, part], bias[n, t, part] = keys_of(
                        self.names, self.wide, 2
                    )
                    if until > where:
                        plain.rows[n][h][where] = Token(self.names, until)
            plain.seen[n] += own
        staged = cache.extend(
            k,
            v,
            position=position,
            evict_at=evict_at,
            logit_bias=bias[..., : self.heads] if self.bias else None,
            lowered=changes,
        )
        self.attend(staged, position)
        plain.evict()
        return staged, torch.tensor(plain.seen, dtype=torch.int32), plain

    def attend(self, staged, position):
        """Attention over pages and over dense copies agree, before the extension is committed."""
        stored = staged.stored()
        q = torch.linspace(
            -1, 1, position.numel() * self.heads * self.wide * 2, dtype=torch.float64
        )
        q = q.view(*position.shape, self.heads * self.wide, 2)
        if staged._until is not None and not staged._streams.private:
            reasons = staged.keys.explain(q)
            assert "a page that several caches share" in reasons["paged_attention pages"]
            assert reasons.chosen == "selected_attention gather"
            with pytest.raises(UnsupportedError, match="a page that several caches share"):
                staged.keys.attend(q, impl="pages")
            paged = staged.keys.attend(q)
        else:
            assert staged.keys.explain(q)["paged_attention pages"].startswith("yes")
            paged = staged.keys.attend(q, impl="pages")
        plain = selected_attention(
            q,
            stored.k,
            stored.v,
            stored.evict_at,
            logit_bias=stored.logit_bias,
            query_position=position,
            key_position=stored.position,
            impl="reference",
        )
        close(paged.out, plain.out)
        close(paged.lse, plain.lse)

    def lower(self, plain, data):
        """Lowers lifetimes of some stored tokens, never below now.

        The lists of the streams are padded at the front, as a selector's ledger is.
        """
        lists = []
        for n, rows in enumerate(plain.rows):
            for row in rows:
                chosen = sorted(
                    data.draw(st.sets(st.sampled_from(sorted(row))), "chosen") if row else []
                )
                for p in chosen:
                    until = min(
                        row[p].evict_at, plain.seen[n] + data.draw(st.integers(0, 3), "until")
                    )
                    row[p] = row[p]._replace(evict_at=until)
                lists.append([(p, row[p].evict_at) for p in chosen])
        most = max((len(one) for one in lists), default=0)
        table = torch.tensor(
            [[(-1, -1)] * (most - len(one)) + one for one in lists], dtype=torch.int32
        )
        table = table.view(len(plain.seen), self.heads, most, 2).transpose(1, 2)
        plain.evict()
        return hb.Lifetimes(table[..., 0], table[..., 1])

    @rule(handle=handles, data=st.data())
    def step(self, handle, data):
        staged, seen, plain = self.change(handle, data)
        spent = handle.cache
        handle.cache, handle.plain = staged.commit(seen), plain
        for again in (spent.check, lambda: staged.commit(seen), lambda: staged.keys):
            with pytest.raises(
                ValueError, match=r"^state: expected the newest, got one .*fork\(\)"
            ):
                again()

    @rule(handle=handles, data=st.data())
    def abandoned_step(self, handle, data):
        self.change(handle, data)

    @rule(handle=handles, data=st.data())
    def failed_transaction(self, handle, data):
        staged, seen, _ = self.change(handle, data)
        following = []

        def fails():
            with hb.cache_transaction():
                following.append(staged.commit(seen))
                for again in (lambda: staged.commit(seen), handle.cache.check, following[0].check):
                    with pytest.raises(ValueError, match=r"^state: expected one call"):
                        again()
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert is_spent(following[0])

    @rule(one=handles, other=handles, data=st.data())
    def cache_transaction(self, one, other, data):
        if one is other:
            return
        changes = [(handle, *self.change(handle, data)) for handle in (one, other)]
        with hb.cache_transaction():
            for handle, staged, seen, plain in changes:
                with hb.cache_transaction():  # an inner transaction joins the outer one
                    handle.cache, handle.plain = staged.commit(seen), plain

    @rule(target=handles, handle=handles)
    def fork(self, handle):
        return self.keep(Handle(handle.cache.fork(), copy.deepcopy(handle.plain)))

    @rule(handle=handles, data=st.data())
    def reorder(self, handle, data):
        sequences = len(handle.plain.seen)
        index = data.draw(st.lists(st.integers(0, sequences - 1), max_size=4)) if sequences else []
        old = handle.cache
        handle.cache = old.reorder(torch.tensor(index, dtype=torch.int64))
        assert is_spent(old)
        plain = Plain(len(index), self.heads)
        plain.seen = [handle.plain.seen[i] for i in index]
        plain.rows = [copy.deepcopy(handle.plain.rows[i]) for i in index]
        handle.plain = plain

    @rule(handle=handles, data=st.data())
    def reset(self, handle, data):
        plain = handle.plain
        gone = [data.draw(st.booleans()) for _ in plain.seen]
        old = handle.cache
        handle.cache = old.reset(torch.tensor(gone, dtype=torch.bool))
        assert is_spent(old)
        for n, which in enumerate(gone):
            if which:
                plain.seen[n], plain.rows[n] = 0, [{} for _ in range(self.heads)]

    @rule(handle=handles, steps=st.integers(0, 6))
    def reserve(self, handle, steps):
        handle.cache.reserve(steps)

    @rule(handle=handles, how=st.sampled_from(["to", "deepcopy", "state_dict"]))
    def copied(self, handle, how):
        old = handle.cache
        if how == "to":
            handle.cache = hb.KVCache.load(old.state_dict(), "cpu")
        elif how == "deepcopy":
            handle.cache = copy.deepcopy(old)
        else:
            handle.cache = hb.KVCache.load(old.state_dict())
        assert pool_of(handle.cache) is None or pool_of(handle.cache) is not pool_of(old)
        old.check()

    @precondition(lambda self: len(self.live) > 1)
    @rule(handle=consumes(handles))
    def drop(self, handle):
        self.live.remove(handle)
        handle.cache = None  # hypothesis keeps the handle itself alive

    @rule(handle=handles)
    def limit(self, handle):
        """A reservation beyond `max_pages` raises an error and changes nothing."""
        cache, pool = handle.cache, pool_of(handle.cache)
        if pool is None:  # there is no pool before the first token
            return
        pool.max_pages = pool.pages
        wanted = (pool.pages + 1) * self.page_size
        if len(handle.plain.seen):
            before = cache.state_dict()
            with pytest.raises(
                ValueError, match=r"^max_pages: expected at least \d+ pages .*, got"
            ):
                cache.reserve(wanted)
            assert same(before, cache.state_dict())
        pool.max_pages = None

    @invariant()
    def content(self):
        for handle in getattr(self, "live", []):
            stored, plain = handle.cache.stored(), handle.plain
            if pool_of(handle.cache) is None:
                assert not any(plain.seen)
                assert (handle.cache.tokens.numel(), handle.cache.nbytes) == (0, 0)
                continue
            assert handle.cache._own.seen.tolist() == plain.seen
            assert handle.cache.tokens.tolist() == [
                [len(rows[h // self.wide]) for h in range(self.heads * self.wide)]
                for rows in plain.rows
            ]
            for n, rows in enumerate(plain.rows):
                for h in range(self.heads * self.wide):
                    there = (stored.position[n, :, h] != NEVER).nonzero()[:, 0]
                    got = {int(stored.position[n, i, h]): i for i in there}
                    assert len(got) == len(there)
                    assert got.keys() == rows[h // self.wide].keys()
                    for p, token in rows[h // self.wide].items():
                        k, v, bias = keys_of(token.name, self.wide, 2)
                        assert torch.equal(stored.k[n, got[p], h], k[h % self.wide])
                        assert torch.equal(stored.v[n, got[p], h], v[h % self.wide])
                        assert stored.evict_at[n, got[p], h] == token.evict_at
                        if self.bias:
                            assert stored.logit_bias[n, got[p], h] == torch.tensor(bias).to(
                                stored.logit_bias.dtype
                            )
            assert not stored.evict_at[stored.position == NEVER].any()

    @invariant()
    def pages(self):
        pools = {
            id(pool_of(handle.cache)): pool_of(handle.cache) for handle in getattr(self, "live", [])
        }
        for pool in pools.values():
            if pool is None:
                continue
            own = [handle for handle in self.live if pool_of(handle.cache) is pool]
            users = torch.zeros(pool.pages, dtype=torch.int32)
            for handle in own:
                rows = handle.cache._own
                listed = rows.table[rows.table >= 0].long()
                users.index_add_(0, listed, torch.ones(len(listed), dtype=torch.int32))
                assert not rows.private or (listed.unique().numel() == listed.numel())
                have = (rows.table >= 0).sum(1)
                assert ((rows.table >= 0) == (torch.arange(rows.width) < have[:, None])).all()
                # a cache with a reservation may leave holes, and keeps its pages
                if not rows.reservation.steps:
                    live = torch.tensor([len(row) for one in handle.plain.rows for row in one])
                    assert (have * self.page_size >= live).all()
            pool.collect()
            if not torch.equal(users, pool.users[:-2]):
                gc.collect()  # a traceback may keep a dead handle alive in a cycle
                pool.collect()
            assert torch.equal(users, pool.users[:-2])
            assert pool.promised == sum(handle.cache._own.reservation.pages for handle in own)
            assert not pool.evict_at[-2].any()


Caches.TestCase.settings = settings(
    max_examples=max(settings().max_examples * 4, 20), stateful_step_count=20
)
TestCaches = Caches.TestCase


def test_a_handle_may_die_inside_a_trace():
    cache = hb.KVCache(2, page_size=2)
    position, evict_at = (
        torch.arange(3).int().expand(2, -1),
        torch.full((2, 3, 1), NEVER, dtype=torch.int32),
    )
    ones = torch.ones(2, 3, 1, 2)
    cache = cache.extend(ones, ones, position=position, evict_at=evict_at).commit(
        torch.tensor([3, 3], dtype=torch.int32)
    )
    fork, pool = cache.fork(), pool_of(cache)
    with FakeTensorMode():
        del fork
        gc.collect()
    assert pool.used() == 4
    assert not (pool.users > 1).any()


def one_row(cache, evict_at, lowered=()):
    """Extends a cache of one sequence and one head by tokens with these lifetimes, and commits.

    Keys are made of positions. `lowered` lists new lifetimes of stored tokens: `(position, until)`.
    """
    own = cache._own
    seen, tokens = int(own.seen) if pool_of(cache) else 0, len(evict_at)
    changes = None
    if lowered:
        changes = hb.Lifetimes(
            *(torch.tensor(x, dtype=torch.int32)[None, :, None] for x in zip(*lowered, strict=True))
        )
    position = torch.arange(seen, seen + tokens, dtype=torch.int32)
    k = position.double()[None, :, None, None].expand(-1, -1, 1, 2)
    until = torch.tensor(evict_at, dtype=torch.int32)[None, :, None]
    staged = cache.extend(k, -k, position=position[None], evict_at=until, lowered=changes)
    return staged.commit(torch.tensor([seen + tokens], dtype=torch.int32))


def row_of(cache):
    """Returns `{position: lifetime}` after a check that keys and values belong to the position."""
    stored = cache.stored()
    there = stored.position[0, :, 0] != NEVER
    assert torch.equal(stored.k[0, there, 0, 0], stored.position[0, there, 0].double())
    assert torch.equal(stored.v[0, there, 0, 1], -stored.position[0, there, 0].double())
    return dict(
        zip(
            stored.position[0, there, 0].tolist(),
            stored.evict_at[0, there, 0].tolist(),
            strict=True,
        )
    )


def six():
    """A cache of six tokens on three pages."""
    return one_row(hb.KVCache(1, page_size=2), [NEVER] * 6)


def test_tokens_that_move_take_their_lowered_lifetimes_along():
    cache = one_row(six(), [], lowered=[(0, 6), (1, 6), (5, 9)])
    assert row_of(cache) == {2: NEVER, 3: NEVER, 4: NEVER, 5: 9}
    assert pool_of(cache).used() == 2


@pytest.mark.parametrize("reserve", [0, 4])
@pytest.mark.parametrize(
    "lowered", [[(0, 6), (1, 6), (5, 9)], [(1, 8)], [(4, 6), (5, 6)], [(n, 6) for n in range(6)]]
)
def test_what_a_fork_does_is_its_own_affair(lowered, reserve):
    cache = six()
    fork = cache.fork()
    if reserve:
        fork.reserve(reserve)
    fork = one_row(fork, [NEVER], lowered=lowered)
    assert row_of(cache) == dict.fromkeys(range(6), NEVER)
    kept = dict.fromkeys(range(7), NEVER) | dict(lowered)
    assert row_of(fork) == {n: until for n, until in kept.items() if until > 7}
    left = {n: until for n, until in kept.items() if until > 7}
    for n in range(3):  # each step changes a page that the two caches shared
        cache = one_row(cache, [], lowered=[(2 * n, 9)])
        assert row_of(cache) == {m: 9 if m % 2 == 0 and m <= 2 * n else NEVER for m in range(6)}
        assert row_of(fork) == left
    for n in list(left):
        fork = one_row(fork, [], lowered=[(n, 8)])
        left[n] = 8
        assert row_of(fork) == left
        assert row_of(cache) == {m: 9 if m % 2 == 0 else NEVER for m in range(6)}


def test_reserved_steps_fill_holes_and_move_nothing():
    cache = one_row(six(), [], lowered=[(n, 7) for n in range(4)])
    cache.reserve(3)
    for _ in range(3):
        cache = one_row(cache, [NEVER])
    assert row_of(cache) == dict.fromkeys(range(4, 9), NEVER)
    assert (cache._own.table >= 0).sum() == 3  # five tokens on three pages: none was moved
    cache = one_row(cache, [NEVER])
    assert row_of(cache) == dict.fromkeys(range(4, 10), NEVER)
    assert pool_of(cache).promised == 0
