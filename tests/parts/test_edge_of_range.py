"""Narrow dtypes at the edge of their range, and another default dtype or device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parts_cases import close

import hamblocks as hb

EDGES = st.lists(
    st.sampled_from([-6e4, -90.0, -1.0, 0.0, 1.0, 12.0, 90.0, 6e4]), min_size=8, max_size=8
)


def at_the_edge(layer, logits, dtype):
    """The layer with gates whose logits are `logits` for the unit inputs, and such inputs."""
    layer = layer.to(dtype)
    values = torch.tensor(logits, dtype=dtype)
    for name, weight in layer.named_parameters():
        if name.split(".")[-2] in ("b_proj", "a_proj", "gate_proj") and weight.dim() == 2:
            weight.data[:] = values
        elif "gate_proj" in name:
            weight.data.zero_()
    return layer, torch.eye(8, dtype=dtype)[None].requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combiner", [hb.GatedSum, hb.SoftmaxMix])
@pytest.mark.parametrize("memory", [hb.GatedDeltaMemory, hb.DeltaMemory])
@given(logits=EDGES)
def test_gates_at_the_edge_of_range_are_finite(memory, combiner, dtype, logits):
    torch.manual_seed(0)
    parts = {"memory": memory(), "combiner": combiner(), "selector": hb.Window(3)}
    layer, x = at_the_edge(hb.HAMLayer(8, 2, **parts), logits, dtype)
    y = layer(x).y
    # small, because a gradient with respect to x is the gradient of a logit times its weight
    y.backward(torch.full_like(y, 1e-6))
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    for name, weight in layer.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logit", [-6e4, -90.0, 90.0, 6e4])
def test_a_learned_router_at_the_edge_of_range_is_finite(logit, dtype):
    torch.manual_seed(0)
    layer = hb.HAMLayer(8, 2, gate=hb.LearnedRouter(), selector=hb.Window(3)).to(dtype)
    layer.gate.mlp[2].bias.data.fill_(logit)
    x = torch.randn(1, 6, 8, dtype=dtype, requires_grad=True)
    y = layer(x).y
    y.float().square().sum().backward()
    for result in (y, x.grad, *(weight.grad for weight in layer.parameters())):
        assert result.isfinite().all()


def outcome(layer, x):
    """y, scores, lifetimes and gradients of one pass, and y of a prefill and a decoded token."""
    layer.zero_grad()
    y, _, stats = layer(x)
    y.square().sum().backward()
    with torch.no_grad():
        first, state, _ = layer.prefill(x[:, :-1])
        last = layer.decode(x[:, -1], state).y
    grads = [weight.grad for weight in layer.parameters() if weight.grad is not None]
    return [y, stats.score, stats.evict_at, first, last, *grads]


SELECTORS = {
    "threshold": lambda: hb.Threshold(0.4) | hb.Window(2),
    "growth": lambda: hb.SublinearGrowth(0.5, 1.5, 32),
    "budget": lambda: hb.Budget(hb.Threshold(0.2), 3, leaves="lowest"),
    "cooldown": lambda: hb.Cooldown(hb.TopK(4), 2),
    "mass": lambda: hb.ErrorMass(0.5, 4),
    "prompt": lambda: hb.PromptFraction(0.4, 5),
}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_another_default_changes_no_result(name, default):
    torch.manual_seed(0)
    layer = hb.HAMLayer(
        16,
        4,
        num_kv_heads=2,
        selector=SELECTORS[name](),
        attention=hb.SelectedAttention(conv_size=2, null_sink=True),
    ).eval()
    x = torch.randn(2, 9, 16)
    wanted = outcome(layer, x)
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(default)
        got = outcome(layer, x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_row_does_not_depend_on_its_batch(name, dtype):
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, selector=SELECTORS[name]()).to(dtype).eval()
    x = torch.randn(5, 17, 16, dtype=dtype)
    with torch.no_grad():
        whole = layer(x)
        for row in range(5):
            for rows in ([row], [row, 0], [4, row, 1]):
                y, _, stats = layer(x[rows])
                where = rows.index(row)
                assert torch.equal(stats.evict_at[where], whole.stats.evict_at[row])
                close(y[where], whole.y[row], 2e-6 if dtype == torch.float32 else 1e-14)
