"""Prefill, decode, fork, reorder, crop, reset in any order are one pass over what each sequence saw."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    precondition,
    rule,
)
from parts_cases import (
    CASES,
    HEADS,
    SEEDS,
    Size,
    build,
    close,
    content,
    cuts,
    inputs,
    over_sizes,
    pack,
    same,
)
from torch.utils._python_dispatch import TorchDispatchMode

import hamblocks as hb
from hamblocks.testing import assert_close


class Stream:
    """A state, and what its sequences saw; marks are what its checkpoints saw."""

    def __init__(self, state, seen, marks=()):
        self.state, self.seen, self.marks = state, seen, list(marks)


class Streams(RuleBasedStateMachine):
    """Every call is compared with a pass of a fresh layer over the full history of each sequence."""

    streams = Bundle("streams")

    @initialize(
        target=streams,
        case=st.sampled_from(sorted(CASES)),
        seed=SEEDS,
        heads=st.sampled_from(HEADS),
        sequences=st.integers(0, 3),
        page_size=st.integers(1, 5),
    )
    def start(self, case, seed, heads, sequences, page_size):
        self.layer = build(case, Size(seed, 1, 0, heads))
        self.width, self.drawn = 4 * heads[0], torch.Generator().manual_seed(seed)
        self.live = 1
        return Stream(
            self.layer.init_state(sequences, page_size=page_size), [self.rows(0)] * sequences
        )

    def rows(self, tokens):
        return torch.randn(tokens, self.width, generator=self.drawn, dtype=torch.float64)

    @torch.no_grad()
    def compare(self, stream, before, y, stats, state):
        """The tokens behind the first `before[n]` of each sequence: outputs, scores, decisions, and what is stored."""
        stored = content(state)
        assert state.position.tolist() == [len(row) for row in stream.seen]
        for n, row in enumerate(stream.seen):
            whole = self.layer(row[None])
            close(y[n], whole.y[0, before[n] :])
            known = whole.stats.evict_at[0]
            if len(row):
                known = self.layer.selector(whole.stats.score).evict_at[0]
            if len(row) > before[n]:
                close(stats.score[n], whole.stats.score[0, before[n] :])
                assert torch.equal(stats.evict_at[n], known[before[n] :])
            else:
                assert stats.score[n].numel() == stats.evict_at[n].numel() == 0
            known = known.expand(-1, self.layer.dims.num_kv_heads)
            for head, (position, evict_at, tokens) in enumerate(stored[n]):
                alive = (known[:, head] > len(row)).nonzero()[:, 0]
                assert position.tolist() == alive.tolist()
                assert torch.equal(evict_at, known[alive, head])
                assert tokens == len(alive)
        stream.state = state

    @rule(stream=streams, tokens=st.integers(0, 12))
    @torch.no_grad()
    def prefill(self, stream, tokens):
        before = [len(row) for row in stream.seen]
        pieces = [self.rows(tokens) for _ in before]
        stream.seen = [torch.cat(pair) for pair in zip(stream.seen, pieces, strict=True)]
        x = (
            torch.stack(pieces)
            if pieces
            else torch.zeros(0, tokens, self.width, dtype=torch.float64)
        )
        y, state, stats = self.layer.prefill(x, stream.state)
        self.compare(stream, before, y, stats, state)

    @rule(stream=streams, data=st.data())
    @torch.no_grad()
    def ragged_prefill(self, stream, data):
        before = [len(row) for row in stream.seen]
        pieces = [self.rows(data.draw(st.integers(0, 11))) for _ in before]
        if not pieces:
            return
        stream.seen = [torch.cat(pair) for pair in zip(stream.seen, pieces, strict=True)]
        x, cu_seqlens = pack(pieces)
        y, state, stats = self.layer.prefill(x, stream.state, cu_seqlens=cu_seqlens)
        y, score, evict_at = (
            part[0].tensor_split(cu_seqlens[1:-1].long())
            for part in (y, stats.score, stats.evict_at)
        )
        self.compare(stream, before, y, stats._replace(score=score, evict_at=evict_at), state)

    @rule(stream=streams, steps=st.integers(1, 3), reserve=st.booleans())
    @torch.no_grad()
    def decode(self, stream, steps, reserve):
        if reserve:
            stream.state.reserve(steps)
        for _ in range(steps):
            before = [len(row) for row in stream.seen]
            pieces = [self.rows(1) for _ in before]
            stream.seen = [torch.cat(pair) for pair in zip(stream.seen, pieces, strict=True)]
            x = torch.cat(pieces) if pieces else torch.zeros(0, self.width, dtype=torch.float64)
            y, state, stats = self.layer.decode(x, stream.state)
            assert y.shape == x.shape
            self.compare(stream, before, y[:, None], stats, state)

    @precondition(lambda self: self.live < 4)
    @rule(target=streams, stream=streams)
    def fork(self, stream):
        self.live += 1
        return Stream(stream.state.fork(), list(stream.seen), stream.marks)

    @rule(stream=streams)
    def spent(self, stream):
        old = stream.state
        self.prefill(stream, 1)
        if not stream.seen:  # a call without a token spends nothing
            assert stream.state is old
            return
        with pytest.raises(ValueError, match=r"^state: expected the newest, got one .*fork\(\)"):
            self.layer.prefill(
                torch.zeros(len(stream.seen), 1, self.width, dtype=torch.float64), old
            )

    @rule(stream=streams, data=st.data())
    def reorder(self, stream, data):
        sequences = len(stream.seen)
        index = data.draw(st.lists(st.integers(0, sequences - 1), max_size=4)) if sequences else []
        stream.state = stream.state.reorder(torch.tensor(index, dtype=torch.int64))
        stream.seen = [stream.seen[i] for i in index]
        stream.marks = [[mark[i] for i in index] for mark in stream.marks]

    @rule(stream=streams)
    def checkpoint(self, stream):
        stream.state = stream.state.checkpoint()
        stream.marks = [*stream.marks, list(stream.seen)]

    @rule(stream=streams, data=st.data())
    def crop(self, stream, data):
        if not stream.marks:
            return
        back = data.draw(st.sampled_from(stream.marks))
        position = torch.tensor([len(row) for row in back])
        # of checkpoints at the same position, the last counts
        last = max(
            i for i, mark in enumerate(stream.marks) if [len(r) for r in mark] == position.tolist()
        )
        stream.state = stream.state.crop(position)
        stream.seen, stream.marks = list(stream.marks[last]), stream.marks[: last + 1]

    @rule(stream=streams)
    def no_such_checkpoint(self, stream):
        if stream.seen:
            with pytest.raises(
                ValueError, match=r"^position: expected one that checkpoint\(\) recorded .*, got"
            ):
                stream.state.crop(10_000)

    @rule(stream=streams, data=st.data())
    def reset(self, stream, data):
        gone = [data.draw(st.booleans()) for _ in stream.seen]
        stream.state = self.layer.reset(stream.state, torch.tensor(gone, dtype=torch.bool))
        stream.seen = [
            self.rows(0) if which else row for which, row in zip(gone, stream.seen, strict=True)
        ]
        stream.marks = []

    @rule(stream=streams, how=st.sampled_from(["to", "deepcopy", "load_state"]))
    def copied(self, stream, how):
        if how == "load_state":
            stream.state, stream.marks = self.layer.load_state(stream.state.state_dict()), []
        else:
            stream.state = stream.state.to("cpu") if how == "to" else copy.deepcopy(stream.state)

    @precondition(lambda self: self.live > 1)
    @rule(stream=consumes(streams))
    def drop(self, stream):
        self.live -= 1

    @rule(stream=streams)
    @torch.no_grad()
    def failed_call(self, stream):
        """An error behind the selection leaves the state as good as it was."""
        x = torch.zeros(len(stream.seen), 2, self.width, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.layer.combiner), "__call__", lambda *_: 1 / 0)
            if not stream.seen:  # no part is called without a token
                self.layer.prefill(x, stream.state)
                return
            with pytest.raises(ZeroDivisionError):
                self.layer.prefill(x, stream.state)


Streams.TestCase.settings = settings(
    max_examples=max(settings().max_examples * 2, 20), stateful_step_count=12
)
TestStreams = Streams.TestCase


def layer_of(selector, seed=0, **parts):
    torch.manual_seed(seed)
    return hb.HAMLayer(32, 4, selector=selector, **parts).eval()


def prefilled(layer, tokens, *, sequences=1, piece=1024):
    state = layer.init_state(sequences)
    x = torch.randn(sequences, tokens, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in x.split(piece, 1):
            _, state, _ = layer.prefill(part, state)
    return state


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_bytes_follow_what_is_kept(fraction, shared):
    if shared:  # one row of pages for all heads
        gate = hb.PeriodicGate(round(1 / fraction) if fraction else 10**6, 5)
        layer = layer_of(hb.Threshold(0.5), gate=gate)
    else:
        layer = layer_of(
            hb.Threshold(float("inf") if fraction == 0 else 1 - fraction), gate=hb.RandomGate()
        )
    state, tokens = prefilled(layer, 4096, sequences=2), 4096
    cache, sizes = state.cache, state.cache.sizes
    assert sizes.streams == (1 if shared else 4)
    streams, page_nbytes = 2 * sizes.streams, sizes.page_size * sizes.token_nbytes
    kept = cache.tokens.sum().item() / (tokens * cache.tokens.numel())
    assert kept == pytest.approx(fraction, abs=0.01)
    full = streams * tokens * sizes.token_nbytes
    ledgers = state.nbytes - cache.nbytes - sum(x.nbytes for x in (state.position, *state.memory))
    assert cache.nbytes + ledgers <= kept * full + streams * page_nbytes
    assert cache.nbytes >= kept * full
    assert cache.capacity_nbytes >= cache.nbytes
    assert cache.capacity_nbytes <= 1.6 * cache.nbytes + 2 * 17 * page_nbytes


def test_bytes_stop_growing_with_a_top_k():
    layer = layer_of(hb.TopK(100) | hb.Window(10))
    state, bytes_at = layer.init_state(2), []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(12):
            _, state, _ = layer.prefill(torch.randn(2, 256, 32, generator=generator), state)
            bytes_at.append((state.nbytes, state.cache.capacity_nbytes))
        assert (
            len({used for used, _ in bytes_at[1:]}) <= 2
        )  # the window and the best overlap more or less
        assert len({capacity for _, capacity in bytes_at[3:]}) == 1
        for _ in range(40):
            _, state, _ = layer.decode(torch.randn(2, 32, generator=generator), state)
            assert state.nbytes <= max(bytes_at[1:])[0]


def test_slabs_go_back_to_the_system():
    layer = layer_of(KeepPrompt(4000))
    state = prefilled(layer, 4000, piece=500)
    full = state.cache.capacity_nbytes
    with torch.no_grad():
        _, state, _ = layer.prefill(torch.randn(1, 2, 32), state)
    assert (state.cache.tokens == 42).all()  # 40 of the prompt and the two behind it
    assert state.cache.nbytes < 0.02 * full
    assert state.cache.capacity_nbytes < 0.5 * full


class KeepPrompt:
    """Stores a prompt of n tokens while it lasts, of it every hundredth for good, and all behind it."""

    def __init__(self, n):
        self.n = n

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        keeps = (position % 100 == 0) | (position >= self.n)
        until = torch.where(keeps, hb.ops.NEVER, self.n + 1).to(torch.int32)
        return hb.Selection(until[..., None].expand(score.shape))


class Replay(torch.nn.Module):
    """Lifetimes that were decided elsewhere, `[T, H]`."""

    def __init__(self, evict_at):
        super().__init__()
        self.evict_at = evict_at

    def forward(self, score, ledger=None, *, position=None, cu_seqlens=None):
        until = self.evict_at[position.clamp(min=0).long()]
        return hb.Selection(torch.where(position[..., None] < 0, -1, until))


@pytest.mark.parametrize("case", ["threshold", "delta-relative-topk", "router-and", "shared-error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_sizes(share=2, drawn=st.lists(st.integers(0, 14), max_size=5))
@torch.no_grad()
def test_low_precision_pieces_are_one_pass_within_the_budget(case, dtype, size, drawn):
    if not size.tokens:
        return
    layer, x = build(case, size, dtype), inputs(size, dtype)
    exact = copy.deepcopy(layer).double()
    layer.selector = Replay(layer(x[:1]).stats.evict_at[0])
    exact.selector = layer.selector
    state, pieces, borders = layer.init_state(size.batch), [], cuts(size.tokens, drawn)
    for begin, end in itertools.pairwise(borders):
        y, state, _ = layer(x[:, begin:end], state=state)
        pieces.append(y)
    right = exact(x.double()).y
    own = 0.0
    for seed in range(
        4
    ):  # one pass is one sample of its own error; inputs moved by a rounding give others
        generator = torch.Generator().manual_seed(seed)
        step = (
            torch.finfo(dtype).eps * (2 * torch.rand(x.shape, generator=generator) - 1) * (seed > 0)
        )
        own = max(
            own, float((layer((x.double() * (1 + step)).to(dtype)).y.double() - right).norm())
        )
    assert_close(torch.cat(pieces, 1), right, "y", own=own)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_beams_are_one_pass(case):
    """Sequences that share pages go on unlike each other."""
    layer = build(case, Size(0, 1, 0, (4, 2)))
    generator = torch.Generator().manual_seed(0)
    histories = list(torch.randn(2, 9, 16, generator=generator, dtype=torch.float64))
    _, state, _ = layer.prefill(torch.stack(histories), layer.init_state(2, page_size=4))
    for step, index in enumerate(
        [[0, 0, 1, 0, 1], [4, 4, 0, 1, 2], [2, 1, 0, 0, 3], [3, 3, 3, 4, 4]]
    ):
        state = state.reorder(torch.tensor(index))
        x = torch.randn(5, 1 + step % 2, 16, generator=generator, dtype=torch.float64)
        histories = [torch.cat([histories[i], own]) for i, own in zip(index, x, strict=True)]
        y, state, _ = layer.prefill(x, state)
        for n, history in enumerate(histories):
            close(y[n], layer(history[None]).y[0, -x.shape[1] :])
            known = layer.selector(layer(history[None]).stats.score).evict_at[0].expand(-1, 2)
            for head, (position, _, _) in enumerate(content(state)[n]):
                assert position.tolist() == (known[:, head] > len(history)).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "modes",
    list(itertools.product([torch.no_grad, torch.inference_mode, torch.enable_grad], repeat=2)),
)
def test_a_state_goes_on_in_another_mode(modes):
    size = Size(0, 2, 12, (4, 2))
    layer, x = build("delta-relative-topk", size).requires_grad_(False), inputs(size)
    with modes[0]():
        _, state, _ = layer.prefill(x[:, :6], layer.init_state(2, page_size=2).fork())
        state = state.checkpoint()
    with modes[1]():
        state.reserve(2)
        for t in range(6, 12):
            y, state, _ = layer.decode(x[:, t], state)
        layer.decode(
            x[:, 6],
            layer.reset(state.crop(6).reorder(torch.tensor([1, 0])), torch.tensor([True, False])),
        )
    close(y.clone(), layer(x).y[:, -1])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_checkpoints_of_a_fork_are_its_own_and_others_may_begin_anew(case):
    layer, x = build(case, Size(0, 1, 0, (4, 2))), inputs(Size(0, 2, 14, (4, 2)))
    whole = layer(x).y
    _, state, _ = layer.prefill(x[:, :9], layer.init_state(2, page_size=2))
    state = state.checkpoint()
    fork = state.fork()
    for one in (state, fork):
        _, one, _ = layer.prefill(x[:, 9:12], one.reorder(torch.tensor([0, 1])))
        for _ in range(2):
            back = one.crop(9)
            assert [point.state.position.tolist() for point in back.checkpoints] == [[9, 9]]
            y, back, _ = layer.prefill(x[:, 9:], back)
            close(y, whole[:, 9:])
    anew = layer.reset(back, torch.tensor([True, False]))
    assert anew.position.tolist() == [0, 14]
    y, anew, stats = layer.prefill(x[:, :3], anew)
    assert stats.position.tolist() == [[0, 1, 2], [14, 15, 16]]
    close(y[0], whole[0, :3])
    close(y[1], layer(torch.cat([x[1:], x[1:, :3]], 1)).y[0, 14:])


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would read a value off the device."""

    WAITS = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "equal",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [case for case in CASES if case != "reference"])
@torch.no_grad()
def test_decode_with_reserved_pages_never_waits_for_the_device(case, monkeypatch):
    size = Size(0, 3, 30, (4, 2))
    layer, x = build(case, size), inputs(size)
    whole = layer(x).y
    _, state, _ = layer.prefill(x[:, :20], layer.init_state(3, page_size=4))
    state.reserve(10)
    before = (
        [slab[0].data_ptr() for slab in state.cache._own.pool.keys],
        state.cache._own.lease.table.data_ptr(),
    )
    steps = []
    with monkeypatch.context() as patch, NoWaiting():
        patch.setattr(
            torch.compiler, "is_compiling", lambda: True
        )  # then no value is looked at for a check
        for t in range(20, 30):
            y, state, _ = layer.decode(x[:, t], state)
            steps.append(y)
    close(torch.stack(steps, 1), whole[:, 20:])
    assert before == (
        [slab[0].data_ptr() for slab in state.cache._own.pool.keys],
        state.cache._own.lease.table.data_ptr(),
    )
    # and on, where the reserve is used up
    y, state, _ = layer.decode(x[:, 0], state)
    close(y, layer(torch.cat([x, x[:, :1]], 1)).y[:, -1])


@torch.no_grad()
def test_too_few_pages_change_nothing():
    layer = layer_of(hb.Threshold(float("-inf")))
    x = torch.randn(2, 40, 32)
    state = layer.init_state(2, page_size=4, max_pages=2 * 4 * 5)
    _, state, _ = layer.prefill(x[:, :19], state)
    saved = state.state_dict()
    for call in (
        lambda: layer.prefill(x[:, 19:], state),
        lambda: state.reserve(2),
        lambda: state.reserve(1000),
    ):
        with pytest.raises(
            ValueError,
            match=r"^max_pages: expected at least \d+ pages \(40 in use and \d+ more\), got 40$",
        ):
            call()
        assert same(saved, state.state_dict())
    y, state, _ = layer.decode(x[:, 19], state)  # the twentieth still fits
    close(y, layer(x[:, :20]).y[:, -1], 1e-5)
    with pytest.raises(ValueError, match=r"^max_pages"):
        layer.decode(x[:, 20], state)


PREFILL = """
import resource, sys, torch
import hamblocks as hb
torch.manual_seed(0)
layer = hb.HAMLayer(128, 2, gate=hb.RandomGate(), selector=hb.Threshold({tau})).eval()
state, x = layer.init_state(1), torch.randn(1, 4096, 128)
with torch.no_grad():
    layer.prefill(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range({pieces}):
        _, state, _ = layer.prefill(x, state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, state.cache.nbytes // 1024, int(state.position))
"""


@pytest.mark.slow
def test_memory_of_a_long_prefill_follows_what_is_kept():
    def peak(tau, pieces=25):
        code = PREFILL.format(tau=tau, pieces=pieces)
        run = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return [int(number) for number in run.stdout.split()]

    (nothing, _, tokens), (tenth, kept, _) = peak("float('inf')"), peak(0.9)
    assert tokens == 102_400
    everything = tokens * 2 * (2 * 64 * 4 + 8) // 1024
    assert kept == pytest.approx(everything / 10, rel=0.05)
    # the pages with their slack, and two copies of them while a piece is attended to
    assert tenth - nothing <= 5 * kept
    assert tenth < everything
