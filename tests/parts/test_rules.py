"""Ownership of parts, copies, casts and autocast of layers, and parts without a base class."""

import copy
import pickle

import pytest
import torch
from parts_cases import CASES, Parity, Size, build, close, inputs, same, tensors
from torch import nn
from torch.nn import functional as F

import hamblocks as hb
from hamblocks import ops

SIZE = Size(0, 2, 12, (4, 2))
PARTS = {
    "memory": hb.GatedDeltaMemory,
    "gate": hb.LearnedRouter,
    "attention": hb.SelectedAttention,
    "combiner": hb.SoftmaxMix,
}


@pytest.mark.parametrize("name", PARTS)
def test_two_layers_cannot_share_a_part(name):
    part = PARTS[name]()
    hb.HAMLayer(8, 2, selector=hb.Window(2), **{name: part})
    with pytest.raises(
        ValueError, match=rf"^{PARTS[name].__name__}: expected a part of its own.*, got one"
    ):
        hb.HAMLayer(8, 2, selector=hb.Window(2), **{name: part})
    with pytest.raises(ValueError, match="expected a part of its own"):
        part.build(hb.LayerDims(8, 2, 2, 4))


def test_a_refused_layer_spends_no_part():
    memory = hb.GatedDeltaMemory()
    with pytest.raises(ValueError, match=r"^combiner: expected a part"):
        hb.HAMLayer(8, 2, selector=hb.Window(2), memory=memory, combiner=hb.GatedSum)
    hb.HAMLayer(8, 2, selector=hb.Window(2), memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@torch.no_grad()
def test_copies_reproduce_outputs(case, again):
    layer, x = build(case, SIZE), inputs(SIZE)
    assert not same(layer(x).y, build(case, Size(7, *SIZE[1:]))(x).y)
    other = again(layer)
    assert same(layer(x), other(x))
    for weight in layer.parameters():
        weight.zero_()
    assert not same(layer(x).y, other(x).y), "a copy has weights of its own"


def test_decoder_state_dict_reproduces_outputs():
    def make(seed):
        torch.manual_seed(seed)
        return hb.Decoder(
            11,
            2,
            lambda i: hb.HAMLayer(
                16, 2, selector=hb.Threshold(hb.TargetFraction(0.5)) | hb.TopK(2)
            ),
        )

    trained, fresh = make(0), make(1)
    tokens = torch.arange(22).view(2, 11) % 11
    trained(tokens)
    hb.step_controllers(trained)
    fresh.load_state_dict(trained.state_dict())
    assert same(trained.eval()(tokens), fresh.eval()(tokens))
    assert 0 < trained(tokens).stats[0].keep_fraction() < 1


class Vowels:
    """The custom gate of the README: no base class."""

    def __init__(self, direction):
        self.direction = direction

    def __call__(self, x, trace):
        return hb.GateOutput((x @ self.direction).unsqueeze(-1))


class TinyHAM(nn.Module):
    """A user's own layer, made of ops."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.beta = nn.Linear(width, 3 * width), nn.Linear(width, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, -1)).unbind(2)
        q, k, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), self.beta(x).sigmoid()
        memory = ops.gated_delta_rule(q, k, v, beta=beta, metric="cosine")
        evict_at = ops.select_topk(memory.score, 4)
        return (memory.out + ops.selected_attention(q, k, v, evict_at).out).flatten(2)


def test_custom_gate():
    direction = torch.linspace(-1, 1, 16)
    layer, x = (
        hb.HAMLayer(16, 2, gate=Vowels(direction), selector=hb.Threshold(0.0)),
        torch.randn(2, 9, 16),
    )
    result = layer(x)
    assert torch.equal(result.stats.evict_at[..., 0] == ops.NEVER, x @ direction >= 0)
    result.y.sum().backward()
    # a part without `build` may be shared
    hb.HAMLayer(16, 2, gate=layer.gate, selector=hb.Threshold(0.0))


def test_custom_layer():
    layer, x = TinyHAM(8), torch.randn(2, 20, 8, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y[:, :10].sum(), x)
    assert not grad[:, 10:].any()
    assert grad[:, :10].any()


def test_custom_memory_and_attention():
    class Mean:
        """Predicts the mean of the values seen; its state is their sum."""

        def __call__(self, x, q, k, v, *, position, state=None, cu_seqlens=None, metric=None):
            past = 0 if state is None else state
            total = past + v.cumsum(1)
            seen = total / (position + 1)[..., None, None]
            before = (total - v) / position.clamp(min=1)[..., None, None]
            score = None if metric is None else ops.surprise(v - before, v, metric=metric)
            return (
                seen,
                hb.MemoryTrace(k, v, torch.ones_like(v[..., 0]), v - before, score, position),
                total[:, -1:],
            )

    class Nothing:
        def __call__(self, q, keys):
            return torch.zeros_like(q)

    layer = hb.HAMLayer(8, 2, memory=Mean(), attention=Nothing(), selector=hb.TopK(2)).double()
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    whole, state, pieces = layer(x), layer.init_state(2), []
    for piece in x.split([4, 1, 5], 1):
        y, state, _ = layer(piece, state=state)
        pieces.append(y)
    close(torch.cat(pieces, 1), whole.y)


@pytest.mark.parametrize("case", CASES)
def test_autocast_leaves_the_memory_in_float32(case):
    layer, x = build(case, SIZE, torch.float32), inputs(SIZE, torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        whole, state = layer(x), layer.init_state(2)
        for piece in x.split([5, 1, 6], 1):
            step = layer(piece, state=state)
            state = step.state
            assert step.y.isfinite().all()
            assert step.stats.score.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in tensors(state.memory) if x.dim() == 4)
    assert whole.y.isfinite().all()
    # Rounding may change decisions near the threshold. The first token reads no other token, so
    # only its own decision matters.
    close(whole.y[:, :1].float(), exact.y[:, :1], 0.1)
    whole.y.float().square().sum().backward()
    for weight in layer.parameters():
        assert weight.grad is None or (
            weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()
        )


def test_parts_say_what_they_are():
    for part, protocol in (
        (hb.GatedDeltaMemory(), "Memory"),
        (Parity(), "Gate"),
        (hb.TopK(1), "Selector"),
        (hb.SelectedAttention(), "Attention"),
        (hb.GatedSum(), "Combiner"),
        (hb.TargetFraction(0.5), "Controller"),
    ):
        assert isinstance(part, getattr(hb.protocols, protocol))
    assert "TopK(k=3)" in repr(hb.TopK(3) | hb.Window(2))
    assert "Window(width=2)" in repr(hb.TopK(3) | hb.Window(2))
