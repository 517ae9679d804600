"""Dense and paged keys give attention the same, and `explain` shows the implementation."""

import pytest
import torch
from hypothesis import given
from parts_cases import Size, build, close, inputs
from torch import nn

import hamblocks as hb
from hamblocks.keys import PAGED_MAX_QUERIES, DenseKeys
from hamblocks.null_sink import attend_with_null
from hamblocks.ops import NEVER, UnsupportedError, selected_attention
from hamblocks.testing import AttentionInputs, attention_inputs, parametrize_with_checks


def dense_of(case):
    tensors = dict(case.tensors())
    q = tensors["q"]
    batch, keys = tensors["k"].shape[:2]
    own = torch.arange(max(q.shape[1], keys)).int()
    query = tensors.get("query_position", own[: q.shape[1]].expand(batch, -1))
    key = tensors.get("key_position", own[:keys].expand(batch, -1))
    return q, hb.DenseKeys(
        tensors["k"],
        tensors["v"],
        position=key,
        evict_at=tensors["evict_at"],
        logit_bias=tensors.get("logit_bias"),
        query_position=query,
    )


CASES = attention_inputs(dtype=torch.float64, packed=None).filter(
    lambda case: "key_lengths" not in case.tensors() and case.tensors()["k"].shape[1]
)


@given(case=CASES)
def test_the_steps_of_dense_keys_are_the_op(case):
    q, keys = dense_of(case)
    weights = keys.softmax(keys.logits(q))
    assert weights.shape == (q.shape[0], q.shape[2], q.shape[1], keys.k.shape[1])
    assert weights.isfinite().all()
    close(keys.read(weights), keys.attend(q, impl="reference").out)
    seen = keys.visible(q.shape[2]).expand(weights.shape)
    if keys.logit_bias is not None:  # a logit bias of -inf hides a key
        seen = seen & (keys.logits(q) > -float("inf"))
    close(weights.sum(-1), seen.any(-1).double())
    assert not weights.masked_fill(seen, 0).any()


@pytest.mark.parametrize("lengths", [(5, 0, 1, 7), (3,)])
def test_dense_keys_of_a_packed_batch(lengths):
    case = AttentionInputs(packed=lengths, dtype=torch.float64, policy="some")
    tensors = dict(case.tensors())
    position = torch.cat([torch.arange(n) for n in lengths]).int()[None]
    keys = hb.DenseKeys(
        tensors["k"],
        tensors["v"],
        position=position,
        evict_at=tensors["evict_at"],
        logit_bias=tensors.get("logit_bias"),
        query_position=position,
        cu_seqlens=tensors["cu_seqlens"],
    )
    q = tensors["q"]
    close(keys.read(keys.softmax(keys.logits(q))), keys.attend(q).out)


def test_distance_counts_tokens_back_and_is_0_where_unseen():
    k = torch.zeros(1, 4, 1, 2)
    position = torch.arange(4).int()[None]
    evict_at = torch.tensor([[[NEVER], [1], [4], [NEVER]]]).int()
    keys = hb.DenseKeys(k, k, position=position, evict_at=evict_at, query_position=position)
    assert keys.distance()[0, 0].tolist() == [
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [2, 0, 0, 0],
        [3, 0, 1, 0],
    ]


def test_what_nobody_sees_may_hold_anything():
    k = torch.full((1, 2, 1, 2), float("nan"))
    k[:, 1] = 1
    position = torch.arange(2).int()[None]
    evict_at = torch.tensor([[[0], [NEVER]]]).int()
    keys = hb.DenseKeys(k, k, position=position, evict_at=evict_at, query_position=position)
    q = torch.ones(1, 2, 1, 2)
    assert keys.read(keys.softmax(keys.logits(q))).tolist() == [[[[0, 0]], [[1, 1]]]]


# a user's own attention parts: ten lines, and no cache


class Alibi:
    """ALiBi: a linear penalty on distance (arXiv 2108.12409)."""

    def __call__(self, q, keys):
        dense, heads = keys.dense(), q.shape[2]
        slope = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float64)[:, None, None]
        return dense.read(dense.softmax(dense.logits(q) - slope * dense.distance(heads)))


class SoftCapped:
    """Logits soft-capped to `(-cap, cap)`, as in Gemma 2 (arXiv 2408.00118)."""

    def __init__(self, cap):
        self.cap = cap

    def __call__(self, q, keys):
        dense = keys.dense()
        return dense.read(dense.softmax(self.cap * torch.tanh(dense.logits(q) / self.cap)))


class NullSink(hb.protocols.Built):
    """A learned logit per head, whose key has value 0 (arXiv 2607.02303)."""

    def make(self, dims):
        self.null = nn.Parameter(torch.zeros(dims.num_heads))

    def forward(self, q, keys):
        dense = keys.dense()
        return dense.read(dense.softmax(dense.logits(q), null=self.null))


@pytest.mark.slow
@parametrize_with_checks(attentions=[Alibi(), SoftCapped(5.0), NullSink()])
def test_attention_parts_of_ones_own(check):
    check()


# which implementation is chosen


def streamed(impl="auto", tokens=1, selector=None, **parts):
    size = Size(0, 2, 20 + tokens, (4, 2))
    layer = hb.HAMLayer(
        16,
        4,
        num_kv_heads=2,
        selector=selector or hb.Threshold(0.8),
        attention=hb.SelectedAttention(impl=impl),
        **parts,
    ).double()
    x = inputs(size)
    with torch.no_grad():
        state = layer.prefill(x[:, :20]).state
    return layer.eval(), x[:, 20:], state


@pytest.mark.parametrize("impl", ["auto", "pages", "reference"])
@torch.no_grad()
def test_decoding_reads_pages_also_by_a_named_implementation(impl, monkeypatch):
    layer, x, state = streamed(impl)
    assert reads(layer, x, state, monkeypatch) == [("paged_attention", impl)]


@torch.no_grad()
def test_an_implementation_of_selected_attention_reads_a_copy(monkeypatch):
    layer, x, state = streamed("gather")
    assert reads(layer, x, state, monkeypatch) == [("selected_attention", "gather")]


def test_a_gradient_reads_a_copy_and_the_reason_is_told(monkeypatch):
    layer, x, state = streamed()
    reasons = explained(layer, x, state.fork())
    assert "no gradient" in reasons["paged_attention pages"]
    assert reasons.chosen == "selected_attention gather"
    assert reads(layer, x, state, monkeypatch) == [("selected_attention", "auto")]
    layer, x, state = streamed("pages")
    with pytest.raises(UnsupportedError, match=r"impl='pages'.*no gradient"):
        layer.prefill(x, state)


@torch.no_grad()
def test_many_queries_read_a_copy_unless_pages_are_named(monkeypatch):
    tokens = PAGED_MAX_QUERIES + 1
    layer, x, state = streamed(tokens=tokens)
    reasons = explained(layer, x, state.fork())
    assert reasons["paged_attention pages"].startswith("yes, when named: a padded copy is faster")
    assert reasons.chosen == "selected_attention gather"
    assert reads(layer, x, state, monkeypatch) == [("selected_attention", "auto")]
    layer, x, state = streamed("pages", tokens)
    assert reads(layer, x, state, monkeypatch) == [("paged_attention", "pages")]


def newest(x, trace):
    """A gate that ranks later tokens higher, so that each token evicts an earlier one."""
    return hb.GateOutput(trace.position.double()[..., None])


@torch.no_grad()
def test_forks_that_evict_read_a_copy(monkeypatch):
    layer, x, state = streamed(selector=hb.TopK(3), gate=newest)
    assert reads(layer, x, state.fork().fork(), monkeypatch) == [("selected_attention", "auto")]
    reasons = explained(layer, x, state.fork())
    assert "several caches share" in reasons["paged_attention pages"]
    assert reasons.chosen == "selected_attention gather"
    own = layer.load_state(state.state_dict())
    assert reads(layer, x, own, monkeypatch) == [("paged_attention", "auto")]


def explained(layer, x, state):
    """The reasons of `keys.explain`, for each call of the layer's attention part."""
    answers = []
    attention = layer.attention

    def spy(q, keys):
        answers.append(keys.explain(q))
        return attention(q, keys)

    spy.prepare = attention.prepare
    del layer.attention
    layer.attention = spy
    layer.prefill(x, state)
    del layer.attention
    layer.attention = attention
    return answers[0]


def reads(layer, x, state, monkeypatch):
    """The ops that the layer's attention calls, as pairs of name and implementation."""
    made = []
    with monkeypatch.context() as patch:
        for name in ("selected_attention", "paged_attention"):
            op = getattr(hb.keys, name)
            patch.setattr(hb.keys, name, spied(op, name, made))
        layer.prefill(x, state)
    return made


def spied(op, name, made):
    def run(*args, impl="auto", **call):
        made.append((name, impl))
        return op(*args, impl=impl, **call)

    run.implementations, run.explain = op.implementations, op.explain
    return run


@torch.no_grad()
@pytest.mark.parametrize("impl", ["pages", "gather", "reference"])
def test_pages_and_a_copy_are_read_alike(impl):
    size = Size(0, 2, 14, (4, 2))
    layer, x = build("delta-relative-topk", size), inputs(size)
    whole, state = layer(x).y, layer.prefill(x[:, :9]).state
    layer.attention.impl = impl
    close(layer.prefill(x[:, 9:], state).y, whole[:, 9:])


@torch.no_grad()
def test_keys_of_a_cache_alone():
    """What is stored can be attended to without a token to add."""
    _, _, state = streamed()
    keys = state.cache.keys(state.position[:, None])
    q = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    stored = state.cache.stored()
    expected = selected_attention(
        q,
        stored.k,
        stored.v,
        stored.evict_at,
        query_position=state.position[:, None],
        key_position=stored.position,
        impl="reference",
    )
    close(keys.attend(q, impl="pages").out, expected.out)
    close(keys.dense().attend(q).out, expected.out)
    with pytest.raises(ValueError, match=r"^cache: expected one that has taken a token, got"):
        hb.KVCache(2).keys(state.position[:, None])


def test_selected_attention_is_what_dense_keys_run():
    q = torch.randn(1, 3, 2, 4)
    position = torch.arange(3).int()[None]
    evict_at = torch.full((1, 3, 2), NEVER, dtype=torch.int32)
    keys = hb.DenseKeys(q, q, position=position, evict_at=evict_at, query_position=position)
    close(keys.attend(q).out, selected_attention(q, q, q, evict_at).out, 1e-6)
    assert keys.dense() is keys
    assert keys.explain(q).chosen == "gather"


# what a layer explains


@torch.no_grad()
def test_a_layer_explains_every_op_it_calls():
    layer, x, state = streamed()
    twin = layer.load_state(state.state_dict())
    explanation = hb.ops.explain(layer, x, state=state)
    assert set(explanation) == {"gated_delta_rule", "surprise", "attention"}
    assert explanation["gated_delta_rule"].chosen == "chunked"
    assert explanation["attention"].chosen == "paged_attention pages"
    assert explanation.chosen["attention"] == "paged_attention pages"
    assert explanation.parts["selector"] == "Threshold"
    lines = str(explanation).splitlines()
    assert lines[0] == (
        "the next piece of each sequence of a state, x [2, 1, 16], without gradients"
    )
    assert lines[1] == "memory: GatedDeltaMemory"
    assert "op attention: paged_attention pages" in lines
    # the state goes on as if nobody had asked
    close(layer.prefill(x, state).y, layer.prefill(x, twin).y)


def test_explaining_counts_nothing_and_changes_nothing():
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, selector=hb.Threshold(hb.TargetFraction(0.5)) | hb.TopK(2))
    x = torch.randn(2, 9, 16)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    explanation = layer.explain(x)
    assert explanation["selected_attention"].chosen == "gather"
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(module.training for module in layer.modules())
    state = layer.prefill(x).state
    state.reserve(3)
    saved = state.state_dict()
    for one in (state, layer.init_state(2)):
        layer.explain(x[:, :1], state=one)
    assert torch.equal(saved["cache"]["k"], state.state_dict()["cache"]["k"])
    assert state.cache._own.reservation.steps == 3
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        layer.explain(x[0])
    assert all(module.training for module in layer.modules())


def test_the_reason_for_a_copy_is_a_gradient():
    layer, x, state = streamed()
    reasons = layer.explain(x, state=state)["attention"]
    assert "no gradient" in reasons["paged_attention pages"]
    with torch.no_grad():
        assert layer.explain(x, state=state)["attention"]["paged_attention pages"] == "yes"


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_null_sink_is_a_softmax_with_one_more_key(impl, packed, biased):
    generator = torch.Generator().manual_seed(0)
    rows = (1, 12) if packed else (2, 6)
    q = torch.randn(*rows, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(*rows, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    null = torch.randn(2, generator=generator, dtype=torch.float64)
    bias = torch.randn(*rows, 2, generator=generator, dtype=torch.float64) if biased else None
    position = torch.arange(6, dtype=torch.int32).repeat(12 // 6).view(rows)
    evict_at = torch.where(torch.rand(*rows, 2, generator=generator) < 0.5, NEVER, 0).int()
    evict_at = torch.maximum(evict_at, position[..., None])
    borders = torch.tensor([0, 6, 12], dtype=torch.int32) if packed else None
    leaves = [x.requires_grad_() for x in (q, k, v, null, bias) if x is not None]

    def results(run):
        keys = DenseKeys(
            k,
            v,
            position=position,
            evict_at=evict_at,
            query_position=position,
            logit_bias=bias,
            cu_seqlens=borders,
        )
        out = run(keys)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    def naive(keys):
        weights = keys.softmax(keys.logits(q), null=null.repeat_interleave(2))
        return keys.read(weights)

    fast = results(lambda keys: attend_with_null(q, keys, null, impl=impl))
    for got, right in zip(fast, results(naive), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        without = attend_with_null(
            q,
            DenseKeys(
                k,
                v,
                position=position,
                evict_at=evict_at,
                query_position=position,
                logit_bias=bias,
                cu_seqlens=borders,
            ),
            null,
            impl=impl,
        )
    torch.testing.assert_close(without, fast[0].detach(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_norm_of_reads_takes_a_null_sink_back():
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    for read_norm in (True, False):
        ys = []
        for null_sink in (True, False):
            torch.manual_seed(0)
            layer = hb.HAMLayer(
                8,
                2,
                selector=hb.Window(4),
                attention=hb.SelectedAttention(null_sink=null_sink),
                combiner=hb.GatedSum(read_norm=read_norm),
            )
            ys.append(layer.double()(x).y)
        change = float((ys[0] - ys[1]).abs().max())
        assert change < 1e-4 if read_norm else change > 1e-2
