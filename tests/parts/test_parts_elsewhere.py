"""A single part that is sharded or offloaded by itself: its parameters come for its own call only."""

from __future__ import annotations

import copy

import pytest
import torch
from parts_cases import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hamblocks as hb
from hamblocks.protocols import NewTokens

# torch warns of in-place ops on what a sharded module returns; a layer has none
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")

PARTS = ("memory", "gate", "selector", "query_gate", "attention", "combiner")


def layer_of(**changes):
    """A layer in which every part has parameters or buffers of its own."""
    torch.manual_seed(0)
    parts = {
        "gate": hb.LearnedRouter(),
        "selector": hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(2),
        "query_gate": hb.ThresholdQueries(hb.LearnedRouter(), 0.3, 2),
        "attention": hb.SelectedAttention(conv_size=3, conv_values=True, null_sink=True),
        "combiner": hb.GatedSum(output_gate=True),
    }
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, **{**parts, **changes})
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return layer


def run(layer, x):
    """y of one pass, of a prefill and of two decoded tokens, in eval mode."""
    layer.eval()
    with torch.no_grad():
        whole = layer(x).y
        first, state, _ = layer.prefill(x[:, :-2])
        pieces = [first]
        for token in x[:, -2:].unbind(1):
            y, state, _ = layer.decode(token, state)
            pieces.append(y[:, None])
    return whole, torch.cat(pieces, 1)


def gradients(layer, x):
    layer.train()
    layer.zero_grad()
    layer(x).y.square().sum().backward()
    return {
        name: getattr(weight.grad, "full_tensor", lambda weight=weight: weight.grad)()
        for name, weight in layer.named_parameters()
        if weight.grad is not None
    }


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("ranks") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Doubles(nn.Module):
    """A part of a user: its `prepare` uses a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def prepare(self, q, k, v, *, position, state=None, cu_seqlens=None):
        return q * self.scale, k, v, None

    def forward(self, q, keys):
        return keys.attend(q).out


class DoublesInItsCall(Doubles):
    prepares_when_called = True

    def forward(self, q, keys):
        return (
            keys.prepared_by(self, q) if isinstance(keys, NewTokens) else super().forward(q, keys)
        )


@pytest.mark.parametrize("name", PARTS)
def test_one_part_is_sharded(mesh, name):
    check_sharded(mesh, layer_of(), name)


def test_a_part_of_a_user_is_sharded(mesh):
    check_sharded(mesh, layer_of(attention=DoublesInItsCall()), "attention")


def check_sharded(mesh, layer, name):
    x = torch.randn(2, 9, 16)
    sharded = copy.deepcopy(layer)
    fully_shard(getattr(sharded, name), mesh=mesh)
    wanted = gradients(layer, x)
    got = gradients(sharded, x)
    assert got.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        close(got[weight], gradient, 1e-5)
    for one, other in zip(run(sharded, x), run(layer, x), strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_one_part_is_offloaded(name, buffers):
    accelerate = pytest.importorskip("accelerate")
    layer, x = layer_of(), torch.randn(2, 9, 16)
    wanted = run(layer, x)
    part = getattr(layer, name)
    accelerate.cpu_offload(part, execution_device="cpu", offload_buffers=buffers)
    assert all(weight.is_meta for weight in part.parameters())
    for got, want in zip(run(layer, x), wanted, strict=True):
        close(got, want, 1e-5)


def test_a_part_that_prepares_outside_its_call_is_refused(mesh):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(2, 9, 16)
    wanted = run(layer_of(attention=DoublesInItsCall()), x)
    for got, want in zip(run(layer_of(attention=Doubles()), x), wanted, strict=True):
        close(got, want)
    sharded, offloaded = layer_of(attention=Doubles()), layer_of(attention=Doubles())
    fully_shard(sharded.attention, mesh=mesh)
    accelerate.cpu_offload(offloaded.attention, execution_device="cpu")
    for layer in (sharded, offloaded):
        with pytest.raises(
            ValueError, match=r"^attention: expected a part with prepares_when_called .*Doubles"
        ):
            layer(x)
    inside = layer_of(attention=DoublesInItsCall())
    accelerate.cpu_offload(inside.attention, execution_device="cpu")
    for got, want in zip(run(inside, x), wanted, strict=True):
        close(got, want)


CONTROLLERS = {
    "target": lambda: hb.TargetFraction(0.5),
    "annealed": lambda: hb.AnnealedFraction(0.5, steps=3),
    "elastic": lambda: hb.ElasticFraction(0.1),
}
CHANGES = {
    "step": lambda layer: hb.step_controllers(layer),
    "fraction": lambda layer: layer.selector.controller.set_fraction(0.3),
    "threshold": lambda layer: layer.selector.controller.set_threshold(0.3),
    "freeze": lambda layer: layer.selector.controller.freeze(),
    "unfreeze": lambda layer: layer.selector.controller.unfreeze(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_changes_of_an_offloaded_controller_are_not_lost_without_a_word(name, change):
    accelerate = pytest.importorskip("accelerate")
    layer = layer_of(selector=hb.Threshold(CONTROLLERS[name]()), query_gate=None)
    inside, outside = copy.deepcopy(layer), copy.deepcopy(layer)
    accelerate.cpu_offload(inside, execution_device="cpu")
    accelerate.cpu_offload(outside, execution_device="cpu", offload_buffers=True)
    x = torch.randn(2, 9, 16)
    for one in (layer, inside, outside):
        with torch.no_grad():
            one.train()(x)
    for one in (layer, inside):
        CHANGES[change](one)
    for buffer, other in zip(layer.buffers(), inside.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, equal_nan=True)
    seen = outside.selector.controller.seen.clone()
    with pytest.raises(ValueError, match=r"^controller: expected one with its buffers in memory"):
        CHANGES[change](outside)
    assert torch.equal(outside.selector.controller.seen, seen)


def test_a_fixed_threshold_has_no_step_and_refuses_a_change_when_offloaded():
    accelerate = pytest.importorskip("accelerate")
    layer = layer_of(selector=hb.Threshold(0.5), query_gate=None).train()
    accelerate.cpu_offload(layer, execution_device="cpu", offload_buffers=True)
    hb.step_controllers(layer)
    with pytest.raises(ValueError, match=r"^controller: .* got FixedThreshold with offloaded"):
        layer.selector.controller.set_threshold(0.1)


def test_steps_on_the_meta_device_move_nothing():
    layer = layer_of().to("meta").train()
    layer(torch.randn(2, 9, 16, device="meta"))
    hb.step_controllers(layer)
    assert all(buffer.is_meta for buffer in layer.buffers())
