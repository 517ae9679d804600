"""Query gates: which queries read, what the others see, and what a call costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import Parity, close, pack, rows_of

import hamblocks as hb
from hamblocks.gated_read import gated_read
from hamblocks.keys import DenseKeys
from hamblocks.ops import NEVER, implementations, selected_attention

EVERYTHING = hb.Threshold(-math.inf)


class Chosen:
    """A query gate that reads at given positions."""

    def __init__(self, positions, window=0):
        self.positions, self.window = positions, window

    def __call__(self, x, trace):
        chosen = torch.tensor(self.positions)
        reads = (trace.position[..., None] == chosen).any(-1)
        return hb.QueryGateOutput(reads, None, self.window)


class Spy(torch.nn.Module):
    """An attention part that records how many queries it got."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def forward(self, q, keys):
        self.queries.append(q.shape[1])
        return keys.attend(q).out


def layer_of(query_gate, **parts):
    torch.manual_seed(0)
    parts = {"selector": EVERYTHING, "attention": Spy()} | parts
    return hb.HAMLayer(8, 2, query_gate=query_gate, **parts).double().eval()


def tokens(count, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 8, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_attention_runs_over_the_queries_that_read_alone():
    layer = layer_of(Chosen([3, 7, 8]))
    result = layer(tokens(12))
    assert layer.attention.queries == [3]
    assert result.stats.reads.nonzero()[:3, 1].tolist() == [3, 7, 8]


@torch.no_grad()
def test_attention_does_not_run_where_no_query_reads():
    layer = layer_of(Chosen([2]))
    state = layer.prefill(tokens(4)).state
    assert layer.attention.queries == [1]
    for _ in range(3):
        state = layer.decode(tokens(1)[:, 0], state).state
    assert layer.attention.queries == [1]
    assert state.cache.tokens.tolist() == [[7, 7]] * 2  # what is stored does not change


@torch.no_grad()
def test_a_query_that_does_not_read_sees_its_window():
    x = tokens(9)
    whole = layer_of(None, selector=hb.Window(3))(x).y
    gated = layer_of(Chosen([], window=3))(x).y
    close(gated, whole)
    # a window cannot bring back what was never stored
    close(
        layer_of(Chosen([], window=3), selector=hb.Threshold(math.inf))(x).y,
        layer_of(None, selector=hb.Threshold(math.inf))(x).y,
    )


@torch.no_grad()
def test_a_window_without_an_end():
    layer = hb.HAMLayer(8, 2, selector=EVERYTHING, query_gate=Chosen([], 2**40))
    x = torch.randn(1, 5, 8)
    windowed = layer(x).y
    layer.query_gate = None
    torch.testing.assert_close(windowed, layer(x).y)


def test_all_queries_reading_is_no_query_gate():
    x = tokens(9)
    close(layer_of(hb.ThresholdQueries(Parity(), -math.inf))(x).y, layer_of(None)(x).y)
    stats = layer_of(hb.ThresholdQueries(Parity(), math.inf))(x).stats
    assert not stats.reads.any()


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    positions=st.lists(st.integers(0, 6), max_size=4),
    window=st.integers(0, 3),
)
@torch.no_grad()
def test_packed_is_one_by_one(lengths, positions, window):
    layer = layer_of(Chosen(positions or [99], window), selector=hb.Window(4))
    rows = rows_of(0, lengths, 8)
    packed, borders = pack(rows)
    together = layer(packed, cu_seqlens=borders).y[0]
    alone = torch.cat([layer(row[None]).y[0] for row in rows if len(row)])
    close(together, alone)


@pytest.mark.parametrize("impl", ["reference", "gather", "flex", "flex-compact"])
@pytest.mark.parametrize("window", [0, 2])
@torch.no_grad()
def test_every_implementation_reads_for_some_queries(impl, window):
    assert impl in implementations(selected_attention)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 40, 2, 16, generator=generator) for _ in range(3))
    position = torch.arange(40, dtype=torch.int32).expand(2, -1)
    drawn = torch.randint(0, 3, (2, 40, 2), generator=generator)
    evict_at = torch.stack([position, position + 5, torch.full_like(position, NEVER)], -1)
    evict_at = evict_at[:, :, None].expand(-1, -1, 2, -1).gather(3, drawn[..., None])[..., 0].int()
    reads = torch.rand(2, 40, generator=generator) < 0.3
    keys = DenseKeys(k, v, position=position, evict_at=evict_at, query_position=position)
    decision = hb.QueryGateOutput(reads, torch.rand(2, 40, 1, generator=generator), window)

    def attend(q, keys):
        return keys.attend(q, impl=impl).out

    whole = DenseKeys(
        *(x.double() for x in (k, v)),
        position=position,
        evict_at=evict_at,
        query_position=position,
    )
    logits = whole.logits(q.double())
    age = position[0, :, None] - position[0]
    near = reads[:, None, :, None] | (age < window)
    weights = whole.softmax(logits.masked_fill(~near, -math.inf))
    factor = torch.where(reads, decision.weight[..., 0].double(), 1)[..., None, None]
    right = whole.read(weights) * factor
    torch.testing.assert_close(
        gated_read(attend, q, keys, decision).double(), right, rtol=1e-4, atol=1e-5
    )


def test_a_router_learns_where_to_read():
    layer = layer_of(hb.ThresholdQueries(hb.LearnedRouter(), 0.0), selector=EVERYTHING).train()
    layer(tokens(6)).y.square().sum().backward()
    gradients = [x.grad for x in layer.query_gate.parameters()]
    assert all(x is not None and x.any() for x in gradients)


def test_tau_is_not_rounded_to_the_dtype_of_the_score():
    """In bfloat16 tau would be the score itself."""

    class Constant:
        def __call__(self, x, trace):
            return hb.GateOutput(torch.full((*x.shape[:2], 1), 0.30078125, dtype=x.dtype))

    gate = hb.ThresholdQueries(Constant(), 0.3015)
    layer = hb.HAMLayer(8, 2, selector=EVERYTHING, query_gate=gate).bfloat16()
    assert not layer(torch.ones(1, 3, 8, dtype=torch.bfloat16)).stats.reads.any()


def test_its_controller_is_stepped_and_saved():
    layer = layer_of(hb.ThresholdQueries(hb.PredictionError(), hb.TargetFraction(0.25))).train()
    layer(tokens(40))
    hb.step_controllers(layer)
    tau = layer.query_gate.controller.tau
    assert tau.isfinite()
    assert layer.state_dict()["query_gate.controller.tau_sum"] == tau
    with torch.no_grad():
        reads = layer.eval()(tokens(40)).stats.reads
    assert 0.1 < reads.float().mean() < 0.4


@pytest.mark.slow
@torch.no_grad()
def test_compiled_is_eager():
    layer = layer_of(hb.ThresholdQueries(hb.PredictionError(), 0.9, window=2))
    x = tokens(12)
    close(torch.compile(layer, fullgraph=True)(x).y, layer(x).y)


def test_it_needs_what_a_gate_needs():
    by_error = hb.ThresholdQueries(hb.PredictionError(), 0.5)
    with pytest.raises(ValueError, match=r"^query_gate: expected one that needs no memory"):
        hb.HAMLayer(8, 2, memory=None, query_gate=by_error)
    with pytest.raises(ValueError, match=r"^query_gate: expected None in a layer without"):
        hb.HAMLayer(8, 2, attention=None, query_gate=by_error)
    for bad in ({"gate": 3}, {"controller": "much"}, {"window": -1}):
        arguments = {"gate": hb.PredictionError(), "controller": 0.5} | bad
        with pytest.raises(ValueError, match=rf"^{next(iter(bad))}: expected"):
            hb.ThresholdQueries(**arguments)


WRONG = {
    "a mask": lambda x, trace: x[..., 0] > 0,
    "numbers": lambda x, trace: hb.QueryGateOutput(x[..., 0]),
    "a decision per head": lambda x, trace: hb.QueryGateOutput(trace.k[..., 0] > 0),
    "a weight per channel": lambda x, trace: hb.QueryGateOutput(x[..., 0] > 0, x),
    "an integer weight": lambda x, trace: hb.QueryGateOutput(
        x[..., 0] > 0, torch.ones_like(x[..., :1], dtype=torch.int64)
    ),
    "half a window": lambda x, trace: hb.QueryGateOutput(x[..., 0] > 0, None, 0.5),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_named(what):
    with pytest.raises(ValueError, match=r"^query_gate.*: expected .*, got "):
        layer_of(WRONG[what])(tokens(4))
