"""torch's own ways to differentiate, rewrite and record a module: right, or refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from parts_cases import close
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured

import hamblocks as hb
from hamblocks.convolution import ShortConvolution

SELECTORS = {
    "threshold": lambda: hb.Threshold(0.4) | hb.Window(2),
    "top-k": lambda: hb.TopK(3),
    "router": lambda: hb.Threshold(0.0) | hb.Window(2),
}


def layer_of(name="threshold", dtype=torch.float64):
    torch.manual_seed(0)
    gate = {"gate": hb.LearnedRouter()} if name == "router" else {}
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, selector=SELECTORS[name](), **gate)
    return layer.to(dtype).eval()


def x_of(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(layer):
    return lambda weights, x: functional_call(layer, weights, (x,)).y.square().sum()


def weights_of(layer):
    return {name: weight.detach() for name, weight in layer.named_parameters()}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample(name):
    layer, x = layer_of(name), x_of(3, 12)
    per_sample = vmap(grad(loss_of(layer)), (None, 0))(weights_of(layer), x[:, None])
    for row in range(3):
        layer.zero_grad()
        layer(x[row : row + 1]).y.square().sum().backward()
        for weight, want in layer.named_parameters():
            close(per_sample[weight][row], want.grad, 1e-9)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_in_a_direction(name):
    layer, x, along = layer_of(name), x_of(2, 12), x_of(2, 12, seed=2)
    _, tangent = jvp(lambda x: layer(x).y, (x,), (along,))
    step = 1e-5
    change = (layer(x + step * along).y - layer(x - step * along).y) / (2 * step)
    assert change.abs().max() > 0.1
    close(tangent, change, 1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, along)
        close(torch.autograd.forward_ad.unpack_dual(layer(dual).y).tangent, change, 1e-5)


def test_opaque_implementations_say_why_they_refuse_a_transform():
    q = x_of(1, 4).view(1, 4, 2, 8)
    evict_at = torch.full((1, 4, 2), 4, dtype=torch.int32)
    chosen = []

    def attended(q):
        explanation = hb.ops.explain(hb.ops.selected_attention, q, q, q, evict_at)
        chosen.append((explanation.chosen, explanation["gather"]))
        return hb.ops.selected_attention(q, q, q, evict_at).out.sum()

    grad(attended)(q)
    attended(q)
    (inside, reason), (outside, _) = chosen
    assert (inside, outside) == ("reference", "gather")
    assert reason == "transforms of torch.func and forward-mode derivatives need plain torch"


def test_second_derivatives_are_refused_and_named_where_they_exist():
    x = x_of(1, 8).requires_grad_()
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        attention = hb.SelectedAttention(impl=impl)
        layer = hb.HAMLayer(16, 4, selector=hb.Window(3), attention=attention).double()
        (first,) = torch.autograd.grad(layer(x).y.square().sum(), x, create_graph=True)
        if impl == "auto":
            message = r"selected_attention, impl='gather', has no second derivatives; impl='ref"
            with pytest.raises(hb.ops.UnsupportedError, match=message):
                first.square().sum().backward()
            continue
        (second,) = torch.autograd.grad(first.square().sum(), x)
        along, step = x_of(1, 8, seed=3), 1e-5

        def squared(x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(layer(x).y.square().sum(), x)[0].square().sum()  # noqa: B023

        change = (squared(x + step * along) - squared(x - step * along)) / (2 * step)
        close((second * along).sum(), change, 1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_of_layers_as_one_call():
    layers, x = [layer_of(dtype=torch.float32) for _ in range(2)], x_of(2, 9, dtype=torch.float32)
    with torch.no_grad():
        layers[1].v_proj.weight *= 2
    weights, buffers = stack_module_state(layers)
    base = hb.HAMLayer(16, 4, num_kv_heads=2, selector=SELECTORS["threshold"]()).eval()
    got = vmap(lambda w, b: functional_call(base, (w, b), (x,)).y)(weights, buffers)
    for one, layer in zip(got, layers, strict=True):
        close(one, layer(x).y, 1e-5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_weights_that_others_compute():
    """weight_norm, pruning and a parametrization of the memory's decay: one pass and decoding agree."""
    layer, x = layer_of(dtype=torch.float32), x_of(2, 9, dtype=torch.float32)
    want = layer(x).y
    parametrizations.weight_norm(layer.v_proj)
    for module in layer.modules():
        if isinstance(module, ShortConvolution):
            parametrizations.weight_norm(module)
    close(layer(x).y, want, 1e-5)
    register_parametrization(layer.memory, "A_log", Halved())
    l1_unstructured(layer.k_proj, "weight", 0.5)
    with torch.no_grad():
        whole = layer(x).y
        assert (whole - want).abs().max() > 1e-3
        y, state, _ = layer.prefill(x[:, :-1])
        close(torch.cat([y, layer.decode(x[:, -1], state).y[:, None]], 1), whole, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_recorded_trace_is_refused_by_name():
    layer = layer_of(dtype=torch.float32).requires_grad_(False)
    message = r"^x: expected a call by torch.compile or torch.export, got one by torch.jit.trace"
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(lambda x: layer(x).y, x_of(2, 9, dtype=torch.float32))


@pytest.mark.parametrize("threshold", [0.4, math.inf])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_on_the_way_back_and_a_gradient_for_every_weight(threshold):
    """A NaN that a later mask removes is an error for anomaly detection; DDP waits for all weights."""
    layer = hb.HAMLayer(16, 4, selector=hb.Threshold(threshold))
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(x_of(2, 9, dtype=torch.float32)).y.square().sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


def test_a_graph_that_is_used_twice_and_one_whose_tensors_are_elsewhere():
    layer, x = layer_of(), x_of(2, 9)
    y = layer(x).y.square().sum()
    y.backward(retain_graph=True)
    first = [weight.grad.clone() for weight in layer.parameters()]
    y.backward()
    for weight, once in zip(layer.parameters(), first, strict=True):
        close(weight.grad, 2 * once, 1e-12)
    layer.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        y = layer(x).y.square().sum()
    y.backward()
    for weight, once in zip(layer.parameters(), first, strict=True):
        assert torch.equal(weight.grad, once)


def test_deterministic_algorithms_and_one_trained_projection():
    layer, x = layer_of(), x_of(2, 9)
    layer(x).y.square().sum().backward()
    want = layer.v_proj.weight.grad.clone()
    layer.zero_grad()
    layer.requires_grad_(False).v_proj.requires_grad_(True)
    torch.use_deterministic_algorithms(True)
    try:
        layer(x).y.square().sum().backward()
        _, state, _ = layer.prefill(x)
        layer.decode(x[:, 0], state)
    finally:
        torch.use_deterministic_algorithms(False)
    close(layer.v_proj.weight.grad, want, 1e-12)
