"""Gates: what each of them scores, against loops and formulas in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from gate_cases import DIMS, score_of, trace_of, without_memory
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import SEEDS, build, close, inputs, over_sizes, same
from torch import Tensor

import hamblocks as hb
from hamblocks.ops import surprise
from hamblocks.protocols import Buildable, HasMetric, reads_given, surrogate_gradient
from hamblocks_ops.surprise import METRICS


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


class ReadsItsScore:
    """A user's gate that reads the score of its metric, and nothing else."""

    metric = "l2"

    def __call__(self, x, trace):
        return hb.GateOutput(trace.score)


@pytest.mark.parametrize("metric", METRICS)
def test_gates_of_a_layer_may_name_different_metrics(metric):
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def scores(query_gate):
        torch.manual_seed(0)
        layer = hb.HAMLayer(12, 2, gate=ReadsItsScore(), selector=hb.TopK(2), query_gate=query_gate)
        return layer.double()(x).stats

    both = scores(hb.ThresholdQueries(hb.PredictionError(metric), 0.5))
    close(both.score, scores(None).score)
    torch.manual_seed(0)
    alone = hb.HAMLayer(12, 2, gate=hb.PredictionError(metric), selector=hb.TopK(2)).double()
    assert torch.equal(both.reads, alone(x).stats.score.mean(-1) >= 0.5)


def test_a_layer_names_the_metric_of_a_users_memory():
    layer = hb.HAMLayer(12, 2, memory=Scores(), gate=hb.PredictionError("l2"), selector=hb.TopK(2))
    assert layer(torch.randn(2, 5, 12)).stats.score.isfinite().all()


@pytest.mark.parametrize(
    "gate", [hb.PredictionError("l2"), hb.SharedGate(hb.PredictionError("l2"))]
)
def test_prediction_error_says_that_it_needs_a_memory(gate):
    expected = r"^gate: expected .* without a memory .*, got PredictionError\('l2'\), which needs a"
    with pytest.raises(ValueError, match=expected):
        score_of(gate, without_memory(trace_of(0, 1, 3)))


@pytest.mark.parametrize(
    "gate",
    [
        hb.RandomGate(3),
        hb.PeriodicGate(2),
        hb.LearnedRouter(),
        hb.PredictionEntropy(5),
        hb.SharedGate(hb.RandomGate(3)),
        hb.WeightedSum([hb.RandomGate(3), hb.PeriodicGate(2)], [1.0, 2.0]),
    ],
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


@pytest.mark.parametrize("gradient", ["bias", "straight_through"])
@given(seed=SEEDS, width=st.sampled_from([None, 1, 5]))
def test_learned_router_scores_with_its_logit(gradient, seed, width):
    torch.manual_seed(seed)
    gate = hb.LearnedRouter(width, gradient=gradient)
    gate.build(DIMS)
    gate.double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    score, bias = gate(x, trace_of(0, 2, 5))
    first, _, second = gate.mlp
    hidden = x @ first.weight.T + first.bias
    logit = hidden * hidden.sigmoid() @ second.weight.T + second.bias
    assert score.shape == bias.shape == (2, 5, 2)
    assert not score.requires_grad
    close(score, logit.detach())
    soft = logit.sigmoid().log()
    if gradient == "bias":
        close(bias, soft)
    else:
        assert not bias.any()
    # the gradient of both is that of log sigmoid
    weights = list(gate.parameters())
    direction = torch.randn_like(bias)
    expected = torch.autograd.grad((soft * direction).sum(), weights, retain_graph=True)
    for got, want in zip(
        torch.autograd.grad((bias * direction).sum(), weights), expected, strict=True
    ):
        close(got, want)


def test_saturation_does_not_tie_the_scores_of_a_router():
    # sigmoid(40) and sigmoid(41) are both 1 in float32
    gate = hb.LearnedRouter()
    gate.build(DIMS)
    with torch.no_grad():
        gate.mlp[2].bias.fill_(1000.0)
    score, bias = gate(torch.randn(1, 50, 12), trace_of(0, 1, 50))
    assert (score.sigmoid() == 1).all()
    assert score[..., 0].unique().numel() > 40
    assert bias.isfinite().all()


def router_layer(gate):
    return hb.HAMLayer(12, 2, selector=hb.Threshold(0.0) | hb.Window(1), gate=gate)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gradient", ["bias", "straight_through"])
def test_learned_router_learns_through_the_logit_bias_alone(shared, gradient):
    torch.manual_seed(0)
    router = hb.LearnedRouter(gradient=gradient)
    layer = router_layer(hb.SharedGate(router) if shared else router)
    x, weights = torch.randn(1, 9, 12), list(router.parameters())

    def gradients():
        return torch.autograd.grad(layer(x).y.square().sum(), weights, allow_unused=True)

    assert all(grad is not None and grad.any() for grad in gradients())
    with_bias = router.forward
    y = layer(x).y
    router.forward = lambda x, trace: with_bias(x, trace)._replace(logit_bias=None)
    assert all(grad is None or not grad.any() for grad in gradients())
    # a straight-through bias changes no result; a soft one does
    is_same = torch.allclose(layer(x).y, y, rtol=1e-5, atol=1e-6)
    assert is_same == (gradient == "straight_through")


def test_a_surrogate_gradient_is_found_in_wrapped_gates():
    straight = hb.LearnedRouter(gradient="straight_through")
    assert surrogate_gradient(hb.SharedGate(straight))
    assert surrogate_gradient(hb.WeightedSum([hb.RandomGate(), straight], [1.0, 1.0]))
    assert not surrogate_gradient(hb.SharedGate(hb.LearnedRouter()))
    assert not surrogate_gradient(hb.WeightedSum([hb.LearnedRouter(), hb.RandomGate()], [1, 1]))
    assert reads_given(hb.SharedGate(hb.WeightedSum([hb.GivenScore(), hb.RandomGate()], [1, 1])))
    assert not reads_given(hb.SharedGate(hb.RandomGate()))


class States(NamedTuple):
    """What a loop over a memory's state finds, `[B, T, H]` each."""

    written: Tensor
    recall_error: Tensor


def states_of(memory, x, trace):
    """A loop in float64 over the state of a memory that saw x."""
    k, v, beta = trace.k, trace.v, trace.beta
    decay = memory.decay(x)
    decay = torch.ones_like(beta) if decay is None else decay.exp()
    batch, tokens, heads, dim = k.shape
    written, error = torch.zeros_like(beta), torch.zeros_like(beta)
    for b, h in itertools.product(range(batch), range(heads)):
        state = torch.zeros(dim, dim, dtype=x.dtype)
        for t in range(tokens):
            before = decay[b, t, h] * state
            residual = v[b, t, h] - before.T @ k[b, t, h]
            state = before + beta[b, t, h] * torch.outer(k[b, t, h], residual)
            written[b, t, h] = (state - before).norm()
            error[b, t, h] = (v[b, t, h] - state.T @ k[b, t, h]).norm()
    return States(written, error)


MEMORIES = {
    "gated": lambda: hb.GatedDeltaMemory(),
    "gated-neg": lambda: hb.GatedDeltaMemory(2, allow_neg_eigval=True),
    "delta": lambda: hb.DeltaMemory(impl="reference"),
}


@pytest.mark.parametrize("kind", MEMORIES)
@given(seed=SEEDS, batch=st.integers(1, 2), tokens=st.integers(1, 12))
@torch.no_grad()
def test_committed_write_and_recall_error_are_those_of_the_state(kind, seed, batch, tokens):
    torch.manual_seed(seed)
    memory = MEMORIES[kind]()
    memory.build(DIMS)
    memory.double()
    x = torch.randn(batch, tokens, 12, dtype=torch.float64)
    q = torch.randn(batch, tokens, 4, 4, dtype=torch.float64)
    k, v = torch.randn(2, batch, tokens, 2, 4, dtype=torch.float64)
    position = torch.arange(tokens).to(torch.int32).expand(batch, tokens)
    _, trace, _ = memory(x, q, k, v, position=position)
    expected = states_of(memory, x, trace)
    # keys have unit length, so the norm of the write is that of beta times the residual
    close(hb.CommittedWrite()(x, trace).score, expected.written)
    close(hb.RecallError()(x, trace).score, expected.recall_error)


@given(seed=SEEDS, scale=st.floats(0.1, 3))
def test_recall_error_knows_the_length_of_the_key(seed, scale):
    trace = trace_of(seed, 2, 5)
    k, v, beta, residual = (
        part.double() for part in (scale * trace.k, trace.v, trace.beta, trace.residual)
    )
    # the state before the write is any that predicts v - residual
    before = k[..., :, None] * (v - residual)[..., None, :] / k.square().sum(-1)[..., None, None]
    after = before + beta[..., None, None] * k[..., :, None] * residual[..., None, :]
    error = (v - (k[..., :, None] * after).sum(-2)).norm(dim=-1)
    trace = trace._replace(k=k, v=v, beta=beta, residual=residual)
    close(score_of(hb.RecallError(), trace), error)
    close(score_of(hb.CommittedWrite(), trace), beta * residual.norm(dim=-1))


@pytest.mark.parametrize("gate", [hb.CommittedWrite(), hb.RecallError()], ids=repr)
def test_gates_of_the_residual_say_what_they_need(gate):
    with pytest.raises(ValueError, match=r"^gate: expected .* without a memory .*, which needs a"):
        score_of(gate, without_memory(trace_of(0, 1, 3)))
    expected = r"^trace: expected a residual for \w+\(\) \(a gate with metric=None gets one\)"
    with pytest.raises(ValueError, match=expected):
        score_of(gate, trace_of(0, 1, 3, metric="l2"))
    with pytest.raises(ValueError, match=r"^gate: expected one that needs no memory .*memory=None"):
        hb.HAMLayer(12, 2, memory=None, gate=gate, selector=hb.TopK(2))
    assert score_of(gate, trace_of(0, 1, 3)._replace(k=trace_of(0, 1, 3).k.bfloat16())).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("memory", [None, "memory"])
def test_norms_are_those_of_what_attention_stores(memory):
    """Of the keys and values in the cache, whatever the memory made of them."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    attention = {"conv_size": 2, "conv_values": True, "qk_norm": False}
    for gate, sign, name in ((hb.KeyNorm(), -1, "k"), (hb.ValueNorm(), 1, "v")):
        layer = hb.HAMLayer(
            12,
            4,
            num_kv_heads=2,
            head_dim=4,
            gate=gate,
            memory=None if memory is None else hb.DeltaMemory(),
            selector=hb.Threshold(-torch.inf),
            attention=hb.SelectedAttention(**attention),
        ).double()
        output = layer.prefill(x)
        cached = getattr(output.state.cache.stored(), name)[:, :5]  # a page has more slots
        close(output.stats.score, sign * cached.norm(dim=-1))


@pytest.mark.parametrize("gate", [hb.KeyNorm(), hb.ValueNorm()], ids=repr)
def test_norms_say_what_they_need_and_are_float32(gate):
    trace = trace_of(0, 1, 3)
    with pytest.raises(ValueError, match=r"^trace: expected stored_k and stored_v for \w+\(\)"):
        score_of(gate, trace._replace(stored_k=None, stored_v=None))
    # 256 squared is out of the range of float16
    large = torch.full((1, 3, 2, 4), 256.0, dtype=torch.float16, requires_grad=True)
    score = score_of(gate, trace._replace(stored_k=large, stored_v=large))
    close(score.abs(), torch.full((1, 3, 2), 512.0))
    assert not score.requires_grad


@given(seed=SEEDS, vocabulary=st.integers(2, 40), scale=st.sampled_from([0.0, 0.1, 1.0, 1e4]))
def test_prediction_entropy_is_the_normalised_entropy(seed, vocabulary, scale):
    torch.manual_seed(seed)
    gate = hb.PredictionEntropy(vocabulary)
    gate.build(DIMS)
    gate.double()
    x = scale * torch.randn(2, 5, 12, dtype=torch.float64)
    score = gate(x, trace_of(0, 2, 5)).score
    assert score.shape == (2, 5, 1)
    assert not score.requires_grad
    for row, got in zip(x.flatten(0, 1), score.flatten(), strict=True):
        logits = [float(row @ weight) for weight in gate.head.weight]
        exps = [math.exp(logit - max(logits)) for logit in logits]
        p = [one / sum(exps) for one in exps]
        entropy = -sum(one * math.log(one) for one in p if one > 0) / math.log(vocabulary)
        assert 0 <= got <= 1
        assert float(got) == pytest.approx(entropy, abs=1e-10)
    if scale == 0:
        close(score, torch.ones_like(score))


def test_a_tied_head_learns_with_the_model():
    torch.manual_seed(0)

    def layer(_index):
        return hb.HAMLayer(12, 2, gate=hb.PredictionEntropy(9), selector=hb.TopK(3))

    model = hb.Decoder(9, 1, layer)
    gate = model.blocks[0].layer.gate
    assert gate.head.weight is model.head.weight
    assert not layer(0).gate.head.weight.requires_grad  # nothing trains it alone
    assert len(list(model.parameters())) == len({id(one) for one in model.parameters()})
    tokens = torch.randint(9, (2, 7))
    scores = [one.score for one in model(tokens).stats]
    model(tokens).logits.square().mean().backward()
    assert gate.head.weight.grad.any()
    with torch.no_grad():
        model.head.weight.mul_(3)
    assert not torch.equal(model(tokens).stats[0].score, scores[0])


def test_a_tied_head_learns_under_autocast():
    # autocast may cache the narrow weight that the gate used without gradient
    layer = hb.HAMLayer(12, 2, gate=hb.PredictionEntropy(9), selector=hb.TopK(3))
    head = torch.nn.Linear(12, 9, bias=False)
    layer.gate.tie(head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(layer(torch.randn(2, 7, 12)).y).float().square().mean()
    loss.backward()
    assert head.weight.grad.any()


def test_a_model_refuses_a_gate_of_another_vocabulary():
    def layer(_index):
        return hb.HAMLayer(12, 2, gate=hb.PredictionEntropy(8), selector=hb.TopK(3))

    with pytest.raises(ValueError, match=r"^weight: expected shape \[V, hidden_size\] = \[8, 12\]"):
        hb.Decoder(9, 1, layer)


def test_only_a_fitting_parameter_is_tied():
    gate = hb.PredictionEntropy(9)
    weight = torch.nn.Parameter(torch.zeros(9, 12))
    with pytest.raises(ValueError, match=r"^gate: expected one that a layer owns"):
        gate.tie(weight)
    gate.build(DIMS)
    with pytest.raises(ValueError, match=r"^weight: expected shape \[V, hidden_size\] = \[9, 12\]"):
        gate.tie(torch.nn.Parameter(torch.zeros(12, 9)))
    with pytest.raises(ValueError, match=r"^weight: expected a Parameter"):
        gate.tie(weight.detach())
    gate.tie(weight)
    assert gate.head.weight is weight


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_given_score_is_what_was_given(dtype):
    given_score = torch.tensor([[[1], [0], [1]]]).to(dtype)
    trace = without_memory(trace_of(0, 1, 3))._replace(given=given_score)
    score = score_of(hb.GivenScore(), trace)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert score.tolist() == [[[1], [0], [1]]]


def test_given_score_names_what_is_missing():
    with pytest.raises(ValueError, match=r"^given_score: expected a score .*GivenScore, got None$"):
        score_of(hb.GivenScore(), trace_of(0, 1, 3))
