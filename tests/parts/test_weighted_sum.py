"""Sums of gates: metrics, heads, biases and modules of the terms."""

import copy

import pytest
import torch
from gate_cases import DIMS, score_of, trace_of
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import SEEDS, close

import hamblocks as hb
from hamblocks.protocols import HasMetric
from hamblocks_ops.surprise import METRICS


@given(seed=SEEDS, metrics=st.lists(st.sampled_from(METRICS), min_size=1, max_size=4))
def test_weighted_sum_of_metrics(seed, metrics):
    gates = [hb.PredictionError(metric) for metric in metrics]
    weights = [0.5 * (-2.0) ** i for i in range(len(gates))]
    gate = hb.WeightedSum(gates, weights)
    one = len(set(metrics)) == 1
    assert gate.metric == (metrics[0] if one else None)
    trace = trace_of(seed, 2, 5, metric=gate.metric)
    expected = sum(
        weight * trace_of(seed, 2, 5, metric=metric).score.double()
        for weight, metric in zip(weights, metrics, strict=True)
    )
    close(score_of(gate, trace).double(), expected, 1e-5)


class HalvedScore:
    """A user's gate that reads the score of its metric."""

    def __init__(self, metric):
        self.metric = metric

    def __call__(self, x, trace):
        assert trace.metric == self.metric
        return hb.GateOutput(trace.score / 2)


def test_a_term_gets_the_score_of_its_own_metric():
    gate = hb.WeightedSum([HalvedScore("l2"), HalvedScore("cosine"), Loud()], [2.0, 4.0, 1.0])
    assert gate.metric is None
    trace = trace_of(0, 2, 5)
    expected = trace.surprise("l2") + 2 * trace.surprise("cosine") + trace.residual.norm(dim=-1)
    close(score_of(gate, trace), expected, 1e-6)


class Loud:
    """A user's gate that reads the residual and says nothing of a metric."""

    def __call__(self, x, trace):
        return hb.GateOutput(trace.residual.norm(dim=-1))


def test_a_sum_needs_a_memory_if_a_term_does():
    for gates in ([hb.PredictionError("l2"), Loud()], [hb.RecallError(), hb.RandomGate()]):
        gate = hb.WeightedSum(gates, [1.0, 1.0])
        assert gate.metric is None  # a term may read the residual
        with pytest.raises(ValueError, match=r"^gate: expected one that needs no memory"):
            hb.HAMLayer(12, 2, memory=None, gate=gate, selector=hb.TopK(2))
    free = hb.WeightedSum([hb.PeriodicGate(2), hb.RandomGate()], [1.0, 1.0])
    assert not isinstance(free, HasMetric)
    hb.HAMLayer(12, 2, memory=None, gate=free, selector=hb.TopK(2))


class Columns:
    """A user's gate with any number of columns of score and bias."""

    def __init__(self, score, bias=None):
        self.output = hb.GateOutput(score, bias)

    def __call__(self, x, trace):
        return self.output


@given(seed=SEEDS, counts=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
def test_weighted_sum_of_any_heads(seed, counts):
    # 4 query heads share 2 key/value heads: the score of one counts for both of its query heads
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(2, 5, heads, generator=generator, dtype=torch.float64)

    scores, biases = [draw(n) for n in counts], [draw(n) if n < 4 else None for n in counts]
    weights = [0.5, -1.0, 2.0, 3.0][: len(counts)]
    gate = hb.WeightedSum(list(map(Columns, scores, biases)), weights)
    score, bias = gate(None, trace_of(0, 2, 5))
    most = max(counts)
    for head in range(most):
        expected = sum(
            weight * one[..., head * one.shape[-1] // most]
            for weight, one in zip(weights, scores, strict=True)
        )
        close(score[..., head], expected)
    given_biases = [one for one in biases if one is not None]
    if not given_biases:
        assert bias is None
        return
    for head in range(bias.shape[-1]):
        close(bias[..., head], sum(one[..., min(head, one.shape[-1] - 1)] for one in given_biases))


def test_a_sum_refuses_heads_that_do_not_fit():
    terms = [Columns(torch.zeros(2, 5, heads)) for heads in (2, 3)]
    expected = r"^gates: expected scores whose heads divide the 3 of another, got 2 heads$"
    with pytest.raises(ValueError, match=expected):
        hb.WeightedSum(terms, [1.0, 1.0])(None, trace_of(0, 2, 5))


def test_the_modules_of_a_sum_are_its_own():
    router = hb.LearnedRouter()
    gate = hb.WeightedSum([hb.RandomGate(), hb.SharedGate(router)], [1.0, 2.0])
    gate.build(DIMS)
    assert [name for name, _ in gate.named_parameters()] == [
        f"gate_1.gate.mlp.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    other = copy.deepcopy(gate)
    assert other.gates[1].gate is not router
    assert other.gates[1] is other.gate_1
    x, trace = torch.randn(2, 5, 12), trace_of(0, 2, 5)
    expected = hb.RandomGate()(x, trace).score + 2 * router(x, trace).score.mean(-1, keepdim=True)
    close(gate(x, trace).score, expected, 1e-6)
    gate.gate_1 = hb.SharedGate(hb.PeriodicGate(2))  # what replaces a module is what is called
    expected = hb.RandomGate()(x, trace).score + 2 * hb.PeriodicGate(2)(x, trace).score
    close(gate(x, trace).score, expected, 1e-6)
