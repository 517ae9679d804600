"""The mixture of experts by its formula, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hamblocks.experts import SparseMLP
from hamblocks.models import HAMConfig, HAMForCausalLM

SIZES = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
CASES = {
    "shared": {"shared_expert_intermediate_size": 7},
    "not normalised": {"norm_topk_prob": False},
    "one of all": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": 5},
}


def made(name: str = "shared", dtype: torch.dtype = torch.float64) -> SparseMLP:
    torch.manual_seed(0)
    return SparseMLP(8, **{**SIZES, **CASES[name]}).to(dtype)


def swiglu(x: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    gate, up = (up_proj @ x).chunk(2)
    return down_proj @ (F.silu(gate) * up)


def by_token(mlp: SparseMLP, x: Tensor) -> Tensor:
    """One token `[hidden]`."""
    share = (mlp.router.weight @ x).exp()
    share = share / share.sum()
    order = sorted(range(len(share)), key=lambda expert: -share[expert].detach())
    best = order[: mlp.num_experts_per_tok]
    whole = share[best].sum() if mlp.norm_topk_prob else 1
    y = torch.zeros_like(x)
    for expert in best:
        own = mlp.experts.up_proj[expert], mlp.experts.down_proj[expert]
        y = y + share[expert] / whole * swiglu(x, *own)
    if mlp.has_shared_expert:
        shared = mlp.shared_expert
        gate = (mlp.shared_gate.weight @ x).sigmoid()
        y = y + gate * swiglu(x, shared.up_proj.weight, shared.down_proj.weight)
    return y


@pytest.mark.parametrize("name", CASES)
def test_the_mixture_is_its_formula_with_its_gradients(name):
    mlp = made(name)
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    weights = [x, *mlp.parameters()]
    expected = torch.stack([by_token(mlp, token) for token in x.flatten(0, 1)]).view(x.shape)
    direction = torch.randn_like(expected)
    got = mlp(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, weights, direction),
        torch.autograd.grad(expected, weights, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_compiled_code_computes_the_same_in_one_graph(name):
    mlp, x = made(name), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-12, atol=1e-12)


def test_edges():
    mlp = made(dtype=torch.bfloat16)
    assert mlp(torch.zeros(0, 3, 8, dtype=torch.bfloat16)).shape == (0, 3, 8)
    y = mlp(torch.randn(2, 1, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert made().to("meta")(torch.zeros(2, 3, 8, dtype=torch.float64, device="meta")).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert made(dtype=torch.float32)(torch.randn(2, 3, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
    ],
)
def test_a_bad_size_is_named(changes, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected .*, got "):
        SparseMLP(8, **{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mlp_layer_types": ["dense", "wide"]}, "mlp_layer_types: expected only dense, sparse"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types: expected num_hidden_layers = 2"),
        ({"mlp_layer_types": ["dense", "dense"]}, "num_experts: expected None"),
        ({"num_experts": None}, "num_experts_per_tok: expected None"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok: expected an integer"),
    ],
)
def test_a_configuration_says_which_layers_are_sparse(changes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        HAMConfig(hidden_size=16, num_hidden_layers=2, **{**SIZES, **changes})


def test_a_model_has_the_mixtures_that_its_configuration_says():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 9, "initializer_range": 0.5}
    assert HAMConfig(**sizes).mlp_layer_types == ["dense", "dense"]
    assert HAMConfig(**sizes, **SIZES).mlp_layer_types == ["sparse", "sparse"]
    config = HAMConfig(**sizes, **SIZES, mlp_layer_types=["dense", "sparse"])
    model = HAMForCausalLM(config)
    mlps = [block.block.mlp for block in model.model.stack.blocks]
    assert [isinstance(mlp, SparseMLP) for mlp in mlps] == [False, True]
    for weight in mlps[1].experts.parameters():
        assert 0.3 < float(weight.detach().std()) < 0.7
