"""Gates: what each of them scores, and that random routing depends on the position alone."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import SEEDS, build, close, inputs, over_sizes, same

import hamblocks as hb
from hamblocks.ops import surprise
from hamblocks.protocols import Buildable, HasMetric
from hamblocks_ops.surprise import METRICS

DIMS = hb.LayerDims(12, 4, 2, 4)


def trace_of(seed, batch, tokens, heads=4, metric=None, begin=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, residual = (torch.randn(batch, tokens, heads, 4, generator=generator) for _ in range(3))
    position = torch.arange(begin, begin + tokens).to(torch.int32).expand(batch, tokens)
    score = None if metric is None else surprise(residual, v, metric=metric)
    beta = k[..., 0].sigmoid()
    return hb.MemoryTrace(k, v, beta, None if metric else residual, score, position, metric)


def score_of(gate, trace):
    return gate(torch.zeros(*trace.k.shape[:2], 12), trace).score


@given(seed=SEEDS, batch=st.integers(1, 2), tokens=st.integers(0, 20), cut=st.integers(0, 20))
@example(seed=0, batch=1, tokens=0, cut=0)
@example(seed=0, batch=1, tokens=1, cut=1)
def test_random_routing_depends_on_the_position_alone(seed, batch, tokens, cut):
    gate, cut = hb.RandomGate(seed), min(cut, tokens)
    whole = score_of(gate, trace_of(0, batch, tokens))
    pieces = [trace_of(1, batch, cut), trace_of(2, batch, tokens - cut, begin=cut)]
    assert torch.equal(whole, torch.cat([score_of(gate, piece) for piece in pieces], 1))
    assert torch.equal(whole, whole[:1].expand_as(whole))
    assert whole.dtype == torch.float32


def test_random_routing_is_uniform_and_differs_everywhere():
    tokens = 20_000
    scores = torch.cat(
        [score_of(hb.RandomGate(seed), trace_of(0, 1, tokens))[0] for seed in (0, 1, 2**40)], 1
    )
    assert scores.min() >= 0
    assert scores.max() < 1
    # each of 16 bins holds 1250 of 20000 on average, with a standard deviation of 34
    for column in scores.T:
        assert (column.histc(16, 0, 1) - tokens / 16).abs().max() < 200
        assert column.unique().numel() > 0.99 * tokens
        assert abs(torch.corrcoef(torch.stack([column[1:], column[:-1]]))[0, 1]) < 0.04
    # seeds and heads draw independently (2**40 is seed 0 again: 32 bits count)
    assert torch.equal(scores[:, :4], scores[:, 8:])
    between = torch.corrcoef(scores[:, :8].T) - torch.eye(8)
    assert between.abs().max() < 0.04


@given(
    n=st.integers(1, 6),
    offset=st.integers(-3, 9),
    begin=st.integers(0, 9),
    tokens=st.integers(0, 12),
)
def test_periodic_is_a_stride(n, offset, begin, tokens):
    score = score_of(hb.PeriodicGate(n, offset), trace_of(0, 2, tokens, begin=begin))
    stride = [float((position - offset) % n == 0) for position in range(begin, begin + tokens)]
    assert score.shape == (2, tokens, 1)
    assert score[0, :, 0].tolist() == score[1, :, 0].tolist() == stride


@pytest.mark.parametrize("metric", ["cosine", "relative_l2", "l2"])
@pytest.mark.parametrize("shared", [False, True])
@over_sizes()
@torch.no_grad()
def test_prediction_error_is_the_surprise_of_the_residual(metric, shared, size):
    # a gate without a metric gets the residual from the memory; with one, the memory's own score
    layer, x = build("window", size), inputs(size)
    seen = []

    def gate(x, trace):
        seen.append(surprise(trace.residual, trace.v, metric=metric))
        return hb.GateOutput(seen[0])

    layer.gate = gate
    layer(x)
    if not size.tokens:  # no part is called without a token
        assert not seen
        return
    layer.gate = hb.PredictionError(metric)
    if shared:
        del layer.gate
        layer.gate = hb.SharedGate(hb.PredictionError(metric))
    assert layer.gate.metric == metric
    score = layer(x).stats.score
    heads = 1 if shared else size.heads[1]
    close(score, seen[0].unflatten(2, (heads, -1)).mean(3))


@given(seed=SEEDS, metric=st.sampled_from(METRICS), asked=st.sampled_from(METRICS))
def test_a_trace_gives_every_metric_of_its_residual(seed, metric, asked):
    # a residual gives every metric; a score alone gives its own
    whole, scored = trace_of(seed, 2, 5), trace_of(seed, 2, 5, metric=metric)
    expected = trace_of(seed, 2, 5, metric=asked).score
    assert torch.equal(whole.surprise(asked), expected)
    assert torch.equal(scored._replace(residual=whole.residual).surprise(asked), expected)
    assert torch.equal(score_of(hb.PredictionError(asked), whole), expected)
    if asked == metric:
        assert torch.equal(scored.surprise(asked), expected)
        return
    missing = f"^trace: expected a residual, or the score of metric '{asked}', got no residual, and"
    with pytest.raises(ValueError, match=missing):
        scored.surprise(asked)


def test_the_surprise_of_a_trace_carries_no_gradient():
    trace = trace_of(0, 1, 3)
    trace = trace._replace(residual=trace.residual.requires_grad_())
    assert not trace.surprise("l2").requires_grad
    assert (
        not trace._replace(score=trace.residual.sum(-1), metric="l2").surprise("l2").requires_grad
    )


def test_a_trace_without_residual_and_score_says_so():
    trace = trace_of(0, 1, 3)._replace(residual=None)
    with pytest.raises(ValueError, match=r"got no residual and no score$"):
        trace.surprise("cosine")
    with pytest.raises(ValueError, match=r"got no residual and no score \(no memory\)$"):
        without_memory(trace).surprise("cosine")
    with pytest.raises(ValueError, match=r"^metric: expected one of cosine, relative_l2, l2, got "):
        trace.surprise("cosin")


class Scores:
    """A user's memory that does not name the metric of its score."""

    def __init__(self):
        self.inner = hb.DeltaMemory()

    def build(self, dims):
        self.inner.build(dims)

    def __call__(self, x, q, k, v, **given):
        read, trace, state = self.inner(x, q, k, v, **given)
        assert trace.metric == given["metric"]
        return read, trace._replace(metric=None), state


def test_a_layer_names_the_metric_of_a_users_memory():
    layer = hb.HAMLayer(12, 2, memory=Scores(), gate=hb.PredictionError("l2"), selector=hb.TopK(2))
    assert layer(torch.randn(2, 5, 12)).stats.score.isfinite().all()


def without_memory(trace):
    """The trace of a layer without a memory."""
    return trace._replace(beta=None, residual=None, score=None)


@pytest.mark.parametrize(
    "gate", [hb.PredictionError("l2"), hb.SharedGate(hb.PredictionError("l2"))]
)
def test_prediction_error_says_that_it_needs_a_memory(gate):
    expected = r"^gate: expected .* without a memory .*, got PredictionError\('l2'\), which needs a"
    with pytest.raises(ValueError, match=expected):
        score_of(gate, without_memory(trace_of(0, 1, 3)))


@pytest.mark.parametrize(
    "gate",
    [hb.RandomGate(3), hb.PeriodicGate(2), hb.LearnedRouter(), hb.SharedGate(hb.RandomGate(3))],
    ids=lambda g: type(g).__name__,
)
def test_other_gates_need_no_memory(gate):
    if isinstance(gate, Buildable):
        gate.build(DIMS)
    x, trace = torch.randn(2, 5, 12), trace_of(0, 2, 5)
    assert same(gate(x, without_memory(trace)), gate(x, trace))


class Halved(torch.nn.Module):
    """A user's gate with a metric and a weight, and no base class of ours."""

    metric = "relative_l2"

    def build(self, dims):
        self.scale = torch.nn.Parameter(torch.full((dims.num_heads,), 0.5))

    def forward(self, x, trace):
        return hb.GateOutput(trace.score * self.scale)


def test_shared_finds_what_a_users_gate_offers():
    gate, trace = hb.SharedGate(Halved()), trace_of(0, 2, 5, metric="relative_l2")
    gate.build(DIMS)
    assert gate.metric == "relative_l2"
    assert [name for name, _ in gate.named_parameters()] == ["gate.scale"]
    close(score_of(gate, trace), trace.score.mean(-1, keepdim=True) / 2)
    assert not isinstance(hb.SharedGate(hb.RandomGate()), HasMetric)


@pytest.mark.parametrize(
    "gate",
    [hb.PredictionError(), hb.RandomGate(), hb.PeriodicGate(2), hb.LearnedRouter()],
    ids=lambda g: type(g).__name__,
)
def test_shared_is_one_column_the_mean_over_heads(gate):
    shared = hb.SharedGate(gate)
    shared.build(DIMS)
    x, trace = torch.randn(2, 5, 12), trace_of(0, 2, 5, metric="cosine")
    one, inner = shared(x, trace), gate(x, trace)
    assert one.score.shape == (2, 5, 1)
    close(one.score, inner.score.mean(-1, keepdim=True))
    assert (one.logit_bias is None) == (inner.logit_bias is None)
    if inner.logit_bias is not None:
        close(one.logit_bias, inner.logit_bias.mean(-1, keepdim=True))
    assert getattr(shared, "metric", None) == getattr(gate, "metric", None)


def test_learned_router_scores_with_a_sigmoid_and_biases_with_its_log():
    gate = hb.LearnedRouter()
    gate.build(DIMS)
    score, bias = gate(torch.randn(2, 5, 12), trace_of(0, 2, 5))
    assert score.shape == bias.shape == (2, 5, 2)
    assert not score.requires_grad
    close(score.log(), bias.detach(), 1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_learned_router_learns_through_the_logit_bias_alone(shared):
    torch.manual_seed(0)
    router = hb.LearnedRouter()
    layer = hb.HAMLayer(
        12, 2, selector=hb.Threshold(0.5), gate=hb.SharedGate(router) if shared else router
    )
    x, weights = torch.randn(1, 9, 12), list(router.parameters())

    def gradients():
        return torch.autograd.grad(layer(x).y.square().sum(), weights, allow_unused=True)

    assert all(grad is not None and grad.any() for grad in gradients())
    with_bias = router.forward
    router.forward = lambda x, trace: with_bias(x, trace)._replace(logit_bias=None)
    assert all(grad is None or not grad.any() for grad in gradients())
