"""Prefill, decode, fork, reorder, crop and reset, in any order, give what one pass gives."""

import copy
import itertools

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
)
from torch.utils._python_dispatch import TorchDispatchMode

import hamblocks as hb
from hamblocks.testing import assert_close


class Stream:
    """A state and its history.

    Attributes:
        state: the state.
        seen: all inputs of each sequence, `[T_n, hidden]`.
        marks: the value of `seen` at each checkpoint of the state.
    """

    def __init__(self, state, seen, marks=()):
        self.state, self.seen, self.marks = state, seen, list(marks)


class Streams(RuleBasedStateMachine):
    """Compares every call with one pass over the full history of each sequence."""

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
        """Compares outputs, scores, lifetimes and stored tokens with one pass.

        `y` and `stats` are of the tokens of sequence n after its first `before[n]`.
        """
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
        if not stream.seen:  # a call without a token does not spend the state
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
        # crop returns to the last checkpoint at a position
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
        """An error after the selection leaves the state valid and unchanged."""
        x = torch.zeros(len(stream.seen), 2, self.width, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.layer.combiner), "__call__", lambda *_: 1 / 0)
            if not stream.seen:  # the layer calls no part without a token
                self.layer.prefill(x, stream.state)
                return
            with pytest.raises(ZeroDivisionError):
                self.layer.prefill(x, stream.state)


Streams.TestCase.settings = settings(
    max_examples=max(settings().max_examples * 2, 20), stateful_step_count=12
)
TestStreams = Streams.TestCase


class Replay(torch.nn.Module):
    """Returns given lifetimes, `[T, H]`, for any score."""

    def __init__(self, evict_at):
        super().__init__()
        self.evict_at = evict_at

    def forward(self, score, ledger=None, *, position=None, cu_seqlens=None):
        until = self.evict_at[position.clamp(min=0).long()]
        return hb.Selection(torch.where(position[..., None] < 0, -1, until))


@pytest.mark.slow
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
    # one pass is one sample of the error that rounding makes; inputs moved by one rounding give
    # further samples
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        step = (
            torch.finfo(dtype).eps * (2 * torch.rand(x.shape, generator=generator) - 1) * (seed > 0)
        )
        own = max(
            own, float((layer((x.double() * (1 + step)).to(dtype)).y.double() - right).norm())
        )
    assert_close(torch.cat(pieces, 1), right, "y", own=own)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_beams_are_one_pass(case):
    """Beams share pages, continue with different tokens, and give what one pass gives."""
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
    """Fails on ops that wait for the device, because they read a value."""

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


# the window of queries that do not read is read in a copy of the pages
COPIES = ("reference", "queries-by-a-router")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in COPIES])
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
        # argument checks do not read values while torch is compiling
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for t in range(20, 30):
            y, state, _ = layer.decode(x[:, t], state)
            steps.append(y)
    close(torch.stack(steps, 1), whole[:, 20:])
    assert before == (
        [slab[0].data_ptr() for slab in state.cache._own.pool.keys],
        state.cache._own.lease.table.data_ptr(),
    )
    # decoding continues after the reserved steps
    y, state, _ = layer.decode(x[:, 0], state)
    close(y, layer(torch.cat([x, x[:, :1]], 1)).y[:, -1])
