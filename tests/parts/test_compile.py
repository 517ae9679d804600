"""A layer under torch.compile(fullgraph=True) gives what it gives in eager mode."""

import pytest
import torch
from parts_cases import close

import hamblocks as hb

LAYERS = {
    "target": lambda: {"selector": hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(2)},
    "router": lambda: {
        "selector": hb.TopK(3) & hb.Window(4),
        "gate": hb.LearnedRouter(),
        "memory": hb.DeltaMemory(),
    },
    "memory alone": lambda: {"attention": None},
    "attention alone": lambda: {"memory": None, "selector": hb.FirstTokens(1) | hb.Window(2)},
}


# Inductor writes and compiles a hundred C++ kernels for a memory and its gradient, which takes
# minutes. So it compiles attention whole and the memory forward; the others end before Inductor,
# with the graph that it would get.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packed", "backend"),
    [
        ("target", False, "aot_eager"),
        ("router", True, "aot_eager"),
        ("memory alone", True, "aot_eager"),
        ("attention alone", False, "inductor"),
    ],
)
def test_compiled_is_eager(name, packed, backend):
    torch.manual_seed(0)
    layer = hb.HAMLayer(8, 2, num_kv_heads=1, **LAYERS[name]())
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32) if packed else None
    x = torch.randn(1, 6, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):  # before the first step of the controller, which sets tau, and after it
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            result = run(leaf, cu_seqlens=cu_seqlens)
            (result.y * torch.arange(8)).sum().backward()
            results.append(
                (result, leaf.grad, [weight.grad.clone() for weight in layer.parameters()])
            )
        (eager, x_grad, grads), (fused, fused_x_grad, fused_grads) = results
        close(fused.y, eager.y, 1e-5)
        if name != "memory alone":  # it decides nothing
            close(fused.stats.score, eager.stats.score, 1e-5)
            assert torch.equal(fused.stats.evict_at, eager.stats.evict_at)
        close(fused_x_grad, x_grad, 1e-4)
        for one, other in zip(fused_grads, grads, strict=True):
            close(one, other, 1e-4)
        hb.step_controllers(layer)
    if name == "target":
        controller = layer.selector.left.controller
        assert controller.started
        assert controller.seen == 0


@pytest.mark.slow
@torch.no_grad()
def test_a_memory_through_inductor():
    torch.manual_seed(0)
    layer, x = hb.HAMLayer(8, 2, num_kv_heads=1, attention=None), torch.randn(2, 6, 8)
    torch.compiler.reset()
    close(torch.compile(layer, fullgraph=True)(x).y, layer(x).y, 1e-5)
