"""`pytest -m gpu`: a layer with the kernels that "auto" takes there, against the same layer in
float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hamblocks as hb

pytestmark = pytest.mark.gpu


def layer(gate: object = None, kv_heads: int = 2) -> hb.HAMLayer:
    torch.manual_seed(0)
    return hb.HAMLayer(
        128, 2, num_kv_heads=kv_heads, gate=gate, selector=hb.Threshold(0.9) | hb.Window(16)
    ).eval()


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double().cpu() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_is_the_layer_of_the_cpu(kv_heads: int) -> None:
    """In bfloat16; every third token is stored, for a score within rounding of tau may flip."""
    x = torch.randn(2, 700, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for device, dtype in (
        ("cpu", torch.float64),
        ("cpu", torch.bfloat16),
        ("cuda", torch.bfloat16),
    ):
        one = layer(hb.PeriodicGate(3, 1), kv_heads).to(device, dtype)
        given = x.to(device, dtype).requires_grad_()
        y = one(given).y
        results.append(
            (
                y,
                *torch.autograd.grad(
                    y, [given, *one.parameters()], torch.ones_like(y), allow_unused=True
                ),
            )
        )
    for wanted, plain, got in zip(*results, strict=True):
        if wanted is not None and bool(wanted.any()):
            assert (
                distance(got, wanted)
                <= 2 * distance(plain, wanted) + torch.finfo(torch.bfloat16).eps
            )


def test_compiles_whole() -> None:
    fast = layer(hb.PeriodicGate(3, 1)).to("cuda", torch.bfloat16)
    x = torch.randn(2, 256, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    compiled = torch.compile(fast, fullgraph=True)
    eager, traced = fast(x).y, compiled(x).y
    assert distance(traced, eager.double().cpu()) < 0.02
    for y in (eager, traced):
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert bool(grad.isfinite().all())


def test_pieces_give_what_one_pass_gives() -> None:
    """Prefill, then token by token through the cache."""
    fast = layer(hb.PeriodicGate(3, 1)).to("cuda", torch.bfloat16)
    x = torch.randn(2, 200, 128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        whole = fast(x).y
        y, state, _ = fast(x[:, :150], state=fast.init_state(2))
        pieces = [y]
        for t in range(150, 200):
            y, state, _ = fast(x[:, t : t + 1], state=state)
            pieces.append(y)
    assert distance(torch.cat(pieces, 1), whole.double().cpu()) < 0.02


@pytest.mark.parametrize("selector", ["threshold", "topk"])
def test_replays_of_a_graph_are_decode_steps(selector: str) -> None:
    """The same kernels on the same numbers: equal bits, up to the error that names the reserve."""
    one = layer(hb.PeriodicGate(3, 1)).to("cuda", torch.bfloat16)
    if selector == "topk":
        torch.manual_seed(0)
        one = hb.HAMLayer(128, 2, selector=hb.TopK(8)).eval().to("cuda", torch.bfloat16)
    x = torch.randn(2, 60, 128, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        state, plain = (one.prefill(x[:, :40]).state for _ in range(2))
        plain.reserve(20)
        step = one.graphed_decode(state, 20)
        for t in range(40, 60):
            y, plain, _ = one.decode(x[:, t], plain)
            assert torch.equal(step(x[:, t]), y), t
    step.state.check()
    assert torch.equal(step.state.cache.tokens, plain.cache.tokens)
    with pytest.raises(ValueError, match=r"^reserve: "):
        step(x[:, 0])


def test_the_kernels_of_a_decoded_token_are_the_ops_of_the_cpu() -> None:
    x = torch.randn(2, 50, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for device, dtype in (
        ("cpu", torch.float64),
        ("cpu", torch.bfloat16),
        ("cuda", torch.bfloat16),
    ):
        one, ys = layer(hb.PeriodicGate(3, 1), 1).to(device, dtype), []
        given = x.to(device, dtype)
        with torch.no_grad():
            state = one.prefill(given[:, :40]).state
            state.reserve(10)
            for t in range(40, 50):
                y, state, _ = one.decode(given[:, t], state)
                ys.append(y)
        results.append(torch.stack(ys))
    wanted, plain, got = results
    assert distance(got, wanted) <= 2 * distance(plain, wanted) + torch.finfo(torch.bfloat16).eps
