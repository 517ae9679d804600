"""Layers without a memory or without attention, in one pass and in pieces."""

import math

import pytest
import torch
from hypothesis import example, given
from parts_cases import SIZES, Size, close, convolved, inputs, pack
from torch.nn import functional as F

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.rope import rotate
from hamblocks.testing import check_layer

PARTS = {"memory": {"memory": None}, "attention": {"attention": None}}


def layer_of(size, parts, dtype=torch.float64):
    torch.manual_seed(size.seed)
    heads, kv_heads = size.heads
    layer = hb.HAMLayer(4 * heads, heads, num_kv_heads=kv_heads, **parts)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return layer.to(dtype).eval()


@given(size=SIZES)
@example(size=Size(0, 2, 0, (2, 1)))
@torch.no_grad()
def test_without_memory_attention_sees_everything(size):
    layer, x = layer_of(size, {"memory": None}), inputs(size)
    q, k, v = (
        proj(x).unflatten(-1, (-1, 4)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    taps = layer.attention.conv.weight
    k = torch.stack([convolved(row, taps) for row in k.flatten(2)]).view_as(k)
    q, k = layer.attention.q_norm(q), layer.attention.k_norm(k)
    q, k = (rotate(part, torch.arange(size.tokens)[None], 10_000.0) for part in (q, k))
    group = size.heads[0] // size.heads[1]
    k, v = (part.repeat_interleave(group, 2) for part in (k, v))
    given = (part.transpose(1, 2) for part in (q, k, v))
    read = F.scaled_dot_product_attention(*given, is_causal=True).transpose(1, 2)
    close(layer(x).y, layer.combiner(x, None, read))
    assert layer(x).stats.keep_fraction() == bool(x.numel())
    if x.numel():
        assert (layer(x).stats.evict_at == NEVER).all()


@given(size=SIZES)
@torch.no_grad()
def test_without_attention_the_memory_is_left(size):
    """A layer without attention equals a layer that stores nothing and so reads nothing."""
    layer, x = layer_of(size, {"attention": None}), inputs(size)
    full = layer_of(size, {"selector": hb.Threshold(math.inf)})
    weights = layer.state_dict()
    for name in ("combiner.gate_proj.weight", "combiner.gate_proj.bias"):
        gate = full.state_dict()[name].unflatten(0, (-1, 2)).clone()
        gate[:, 0] = weights[name]
        weights[name] = gate.flatten(0, 1)
    full.load_state_dict(weights, strict=False)
    close(layer(x).y, full(x).y)
    assert layer(x).stats.keep_fraction() == 0
    assert layer(x).stats.evict_at is None


def test_an_absent_part_has_no_weights_and_no_cache():
    names = {which: set(hb.HAMLayer(8, 2, **parts).state_dict()) for which, parts in PARTS.items()}
    assert names["memory"] == {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "attention.q_norm.weight",
        "attention.k_norm.weight",
        "attention.conv.weight",
        "combiner.attention_norm.weight",
        "combiner.gate_proj.weight",
        "combiner.gate_proj.bias",
        "combiner.o_proj.weight",
    }
    assert not any("attention" in name for name in names["attention"])
    layer = hb.HAMLayer(8, 2, attention=None)
    assert layer.combiner.gate_proj.weight.shape == (2, 8)
    state = layer.prefill(torch.randn(2, 5, 8)).state
    assert state.cache is None
    assert state.nbytes == sum(x.nbytes for x in (state.position, *state.memory))
    state.reserve(4)  # does nothing: there is no cache
    assert hb.HAMLayer(8, 2, memory=None).prefill(torch.randn(2, 5, 8)).state.memory is None


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_states_go_on_fork_reorder_crop_and_save(name):
    size = Size(0, 2, 12, (4, 2))
    layer, x = layer_of(size, PARTS[name]), inputs(size)
    whole = layer(x).y
    y, state, _ = layer.prefill(x[:, :5])
    state = state.checkpoint()
    close(layer.prefill(x[:, 5:], state.fork()).y, whole[:, 5:])
    close(
        layer.prefill(x[[1, 0], 5:], state.fork().reorder(torch.tensor([1, 0]))).y,
        whole[[1, 0], 5:],
    )
    after = layer.prefill(x[:, 5:9], state).state
    assert after.position.tolist() == [9, 9]
    close(layer.prefill(x[:, 5:], after.crop(5)).y, whole[:, 5:])
    close(layer.prefill(x[:, 9:], layer.load_state(after.state_dict())).y, whole[:, 9:])
    anew = layer.reset(after, torch.tensor([True, False]))
    close(layer.prefill(x[:, :3], anew).y[0], whole[0, :3])
    pieces, cu_seqlens = pack([x[0, :7], x[1, :4]])
    y, state, _ = layer.prefill(pieces, cu_seqlens=cu_seqlens)
    close(y[0], torch.cat([whole[0, :7], whole[1, :4]]))
    assert state.position.tolist() == [7, 4]


@pytest.mark.parametrize("name", PARTS)
def test_bfloat16_and_gradients(name):
    size = Size(0, 2, 9, (4, 2))
    layer = layer_of(size, PARTS[name], torch.bfloat16)
    y = layer(inputs(size, torch.bfloat16)).y
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in layer.parameters())
    assert layer.v_proj.weight.grad.any()


def test_what_the_trace_of_a_layer_without_a_memory_says():
    seen = []

    def gate(x, trace):
        seen.append(trace)
        return hb.GateOutput(x[..., :1])

    layer = hb.HAMLayer(16, 4, num_kv_heads=2, memory=None, gate=gate, selector=hb.TopK(2))
    x = torch.randn(2, 5, 16)
    layer(x)
    (trace,) = seen
    assert (trace.beta, trace.residual, trace.score) == (None, None, None)
    assert trace.k.shape == trace.v.shape == (2, 5, 4, 4)
    assert torch.equal(trace.v[:, :, ::2], layer.v_proj(x).unflatten(-1, (2, 4)))
    assert trace.position.tolist() == [list(range(5))] * 2


def test_without_a_gate_no_score_is_needed():
    layer = hb.HAMLayer(8, 2, gate=None, selector=hb.Window(3))
    stats = layer(torch.randn(1, 6, 8)).stats
    assert stats.score.shape == (1, 6, 1)
    assert not stats.score.any()
    assert stats.evict_at[0, :, 0].tolist() == [3, 4, 5, 6, 7, 8]


WRONG = {
    "selector": {},
    "gate without attention": {"attention": None, "gate": hb.PeriodicGate(2)},
    "selector without attention": {"attention": None, "selector": hb.Window(2)},
    "gate without a memory": {"memory": None, "gate": hb.PredictionError()},
    "gate for a selector that reads scores": {"memory": None, "selector": hb.Threshold(0.9)},
    "gate for a side that reads scores": {"gate": None, "selector": hb.Window(2) | hb.TopK(2)},
    "attention": {"memory": None, "attention": None},
}


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_need_an_absent_one(what):
    with pytest.raises(ValueError, match=rf"(?s)^{what.split()[0]}: expected .*, got "):
        hb.HAMLayer(8, 2, **WRONG[what])


@pytest.mark.parametrize("name", PARTS)
def test_states_of_other_layers_are_refused(name):
    layer = hb.HAMLayer(8, 2, **PARTS[name])
    other = hb.HAMLayer(8, 2, **PARTS["attention" if name == "memory" else "memory"])
    with pytest.raises(ValueError, match=r"^state: expected one with"):
        layer.prefill(torch.randn(1, 3, 8), other.init_state(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_they_pass_the_checks_of_layers(name):
    check_layer(hb.HAMLayer(8, 2, num_kv_heads=1, **PARTS[name]), profile="ci", only=LAWS)


LAWS = [
    "check_layer_has_its_shapes",
    "check_layer_is_causal",
    "check_layer_any_split_is_one_pass",
    "check_layer_packed_is_one_by_one",
    "check_layer_packed_pieces_are_one_pass",
    "check_layer_forks_go_on_alone",
    "check_layer_rows_are_independent",
]
