"""A layer whose weights another library offloads, quantises, wraps or leaves on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from parts_cases import close
from torch import nn

import hamblocks as hb

LAYERS = {
    "default": lambda: {"selector": hb.Threshold(0.4) | hb.Window(2)},
    "sink and convolution": lambda: {
        "selector": hb.TopK(3) | hb.Window(2),
        "attention": hb.SelectedAttention(conv_size=3, conv_values=True, null_sink=True),
        "gate": hb.LearnedRouter(),
    },
    "own projections": lambda: {
        "selector": hb.Window(3),
        "memory": hb.DeltaMemory(projections="own", num_heads=4, head_dim=6),
    },
    "memory alone": lambda: {"attention": None, "memory": hb.GatedDeltaMemory(projections="own")},
    "queries": lambda: {
        "selector": hb.Window(4),
        "query_gate": hb.ThresholdQueries(hb.LearnedRouter(), 0.3, 2),
    },
}


def layer_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return hb.HAMLayer(16, 4, num_kv_heads=2, **LAYERS[name]()).to(dtype).eval()


def run(layer, x):
    """y of one pass, of a prefill and of three decoded tokens."""
    with torch.no_grad():
        whole = layer(x).y
        y, state, _ = layer.prefill(x[:, :-3])
        pieces = [y]
        for t in range(x.shape[1] - 3, x.shape[1]):
            y, state, _ = layer.decode(x[:, t], state)
            pieces.append(y[:, None])
    return whole, torch.cat(pieces, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_offloaded_to_the_cpu(name):
    accelerate = pytest.importorskip("accelerate")
    layer, x = layer_of(name), torch.randn(2, 9, 16)
    wanted = run(layer, x)
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert all(weight.is_meta for weight in layer.parameters())
    for got, want in zip(run(layer, x), wanted, strict=True):
        close(got, want, 1e-5)  # the loaded weights are aligned in another way


def test_dispatched_by_a_device_map(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    layer, x = layer_of("default"), torch.randn(2, 9, 16)
    wanted = run(layer, x)
    places = {name: "cpu" for name, _ in layer.named_children()}
    places["memory"] = "disk"
    layer = accelerate.dispatch_model(
        layer, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    for got, want in zip(run(layer, x), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_linear_layers_in_int8(name):
    layer, x = layer_of(name), torch.randn(2, 9, 16)
    wanted = run(layer, x)[0]
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    whole, pieces = run(quantised, x)
    # dynamic quantisation scales by the largest entry of a call, so pieces differ from one pass
    for got in (whole, pieces):
        assert got.shape == wanted.shape
        assert got.isfinite().all()
    error = (whole - wanted).norm() / wanted.norm()
    assert error < (0.5 if name == "sink and convolution" else 0.2)


class Int8(torch.Tensor):
    """A weight in int8 whose dtype is another than that of the activations, as in torchao."""

    @staticmethod
    def __new__(cls, values, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype)

    def __init__(self, values, scale, dtype):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().amax() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale, torch.bfloat16)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            real = weight.values.to(x.dtype) * weight.scale.to(x.dtype)
            return nn.functional.linear(x, real, *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{function}")


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_tensor_subclasses_of_another_dtype(name):
    layer, x = layer_of(name), torch.randn(2, 9, 16)
    rounded = copy.deepcopy(layer)
    for module, other in zip(layer.modules(), rounded.modules(), strict=True):
        if isinstance(module, nn.Linear):
            weight = Int8.of(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
            other.weight.data = weight.values * weight.scale
    assert {weight.dtype for weight in layer.parameters()} == {torch.float32, torch.bfloat16}
    for got, want in zip(run(layer, x), run(rounded, x), strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_dtype_of_x_is_named(name, x_dtype):
    expected = (
        r"x: expected dtype float32, as the layer, got (float64|bfloat16) \[2, 5, 16\] on cpu"
    )
    with pytest.raises(ValueError, match=expected):
        layer_of(name)(torch.randn(2, 5, 16, dtype=x_dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_device_of_x_is_named(name):
    x, layer = torch.randn(2, 5, 16), layer_of(name)
    with pytest.raises(ValueError, match=r"x: expected device cpu, as the layer, got .* on meta"):
        layer(x.to("meta"))
    # torch itself computes from a meta weight, without an error
    with pytest.raises(ValueError, match=r"x: expected device meta, as the layer, got .* on cpu"):
        layer.to("meta")(x)


def test_an_error_that_x_does_not_explain_stays_what_it_is():
    layer = layer_of("default")

    def broken(*_):
        raise RuntimeError("out of memory")

    layer.memory.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(torch.randn(2, 5, 16))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_shapes_on_the_meta_device(name, packed):
    real = layer_of(name)
    x = torch.randn(1 if packed else 2, 9, 16)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    wanted = real(x, cu_seqlens=cu_seqlens)
    layer = real.to("meta")
    given = None if cu_seqlens is None else cu_seqlens.to("meta")
    got = layer(x.to("meta"), cu_seqlens=given)
    assert got.y.is_meta
    assert (got.y.shape, got.y.dtype) == (wanted.y.shape, wanted.y.dtype)
    if wanted.stats.evict_at is not None:
        assert got.stats.evict_at.shape == wanted.stats.evict_at.shape
        assert got.stats.score.shape == wanted.stats.score.shape


def test_the_memory_decodes_on_the_meta_device_and_a_cache_refuses():
    layer, x = layer_of("memory alone").to("meta"), torch.randn(2, 5, 16, device="meta")
    y, state, _ = layer.prefill(x)
    assert layer.decode(y[:, 0], state).y.shape == (2, 16)
    with pytest.raises(ValueError, match="x: expected values beside a state with a cache"):
        layer_of("default").to("meta").prefill(x)


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_hooks_of_a_layer_belong_to_every_call(method):
    layer, seen = layer_of("default"), []
    _, state, _ = layer.prefill(torch.randn(2, 3, 16))
    layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 16) if method == "decode" else torch.randn(2, 3, 16)
    getattr(layer, method)(x, state)
    assert seen == [1]


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_norms_compute_in_the_wider_dtype(x_dtype, weight_dtype):
    from hamblocks.norm import RMSNorm

    norm = RMSNorm(6, eps=1e-6).to(weight_dtype)
    nn.init.uniform_(norm.weight)
    x = torch.randn(3, 6).to(x_dtype)
    y = norm(x)
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == torch.float32
    close(y.double(), wide / root * norm.weight.double(), 1e-6)
