"""Kernels of one decoded token: each is the torch ops of its part, alone and in every layer."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import chosen_as_on_a_gpu, without_values
from parts_cases import CASES, Size, build, inputs
from torch import Tensor
from torch.nn import functional as F

import hamblocks as hb
from hamblocks.rope import rotate
from hamblocks.state import leaves
from hamblocks_ops import decode

F64 = torch.float64
topk = import_module("hamblocks.selectors.topk")
kernels = import_module("hamblocks_ops.decode.triton")


def close(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


def drawn(draw: Any, *shape: int) -> Tensor:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(*shape, dtype=F64, generator=random)


@given(st.data())
def test_heads_are_convolved_activated_normed_and_turned(data: st.DataObject) -> None:
    """Any parts in any order, against torch's own functions and `hamblocks.rope`."""
    draw = data.draw
    sequences, taps = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    pairs = draw(st.integers(1, 3))
    parts, right, kept, channel = [], [], [], 0
    position = torch.tensor(
        draw(st.lists(st.integers(0, 10**6), min_size=sequences, max_size=sequences)),
        dtype=torch.int32,
    )[:, None]
    if draw(st.booleans()):
        position = position[:1].expand(sequences, 1)
    theta = draw(st.sampled_from([10.0, 1e6]))
    frequency = 1.0 / theta ** (torch.arange(pairs, dtype=F64) / pairs)
    drawn_parts = draw(st.integers(1, 3))
    plans = [
        (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans()))
        for _ in range(drawn_parts)
    ]
    widths = [draw(st.integers(2 * pairs, 2 * pairs + 3)) for _ in plans]
    total = sum(h * d for (h, _, convolves, _), d in zip(plans, widths, strict=True) if convolves)
    weight, state = drawn(draw, total, taps), drawn(draw, sequences, taps - 1, total)
    for (count, repeat, convolves, turns), dim in zip(plans, widths, strict=True):
        # every other head of a wider tensor, as a slice of a projection may be
        x = drawn(draw, sequences, 1, 2 * count, dim)[:, :, ::2]
        y, silu = x, draw(st.booleans())
        if convolves:
            own = slice(channel, channel + count * dim)
            before = torch.cat([state[..., own], x.flatten(2)], 1)
            kept.append(before[:, 1:])
            y = (before * weight[own].mT).sum(1, keepdim=True).unflatten(2, (count, dim))
        y = F.silu(y) if silu else y
        norm = draw(st.sampled_from(["none", "unit", "unit with eps", "rms"]))
        how: dict[str, Any] = {}
        if norm == "unit":
            y, how = F.normalize(y, dim=-1), {"unit": True}
        elif norm == "unit with eps":
            y = y * (y.square().sum(-1, keepdim=True) + 0.1).rsqrt()
            how = {"unit": True, "unit_eps": 0.1}
        elif norm == "rms":
            how = {"weight": drawn(draw, dim), "eps": 0.1}
            y = F.rms_norm(y, (dim,), how["weight"], 0.1)
        if turns:
            turned = rotate(y[..., : 2 * pairs], position, theta)
            y = torch.cat([turned, y[..., 2 * pairs :]], -1)
        place = channel if convolves else None
        parts.append(decode.Heads(x, repeat, place, silu, turns=turns, **how))
        right.append(y.repeat_interleave(repeat, 2))
        channel += count * dim if convolves else 0
    conv = decode.Convolution(weight, state) if total else None
    got, after = decode.heads(parts, conv, decode.Rotation(position, frequency))
    for one, other in zip(got, right, strict=True):
        # an angle of 1e6 has an error of 1e-10 in float64
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if after is not None:
        assert torch.equal(after, torch.cat(kept, -1))


@given(st.data())
def test_decay_and_strength_are_their_formulas(data: st.DataObject) -> None:
    draw, heads = data.draw, data.draw(st.integers(1, 5))
    a, b = (draw(st.sampled_from([1.0, 30.0, 800.0])) * drawn(draw, 3, 1, heads) for _ in "ab")
    A_log, dt_bias = drawn(draw, heads), drawn(draw, heads)
    most = draw(st.sampled_from([1.0, 2.0]))
    g, beta = decode.decay_and_strength(a, A_log, dt_bias, b, most)
    # torch's softplus is a line beyond 20; its other form is exact
    softplus = torch.logaddexp(a + dt_bias, torch.zeros(()))
    close(g, -A_log.exp() * softplus)
    close(beta, most * b.sigmoid())


@given(st.data())
def test_mix_is_the_gated_sum(data: st.DataObject) -> None:
    draw = data.draw
    sequences, heads, dim = (draw(st.integers(1, 4)) for _ in range(3))
    reads = drawn(draw, sequences, 1, heads, dim), drawn(draw, sequences, 1, heads, dim)
    norms = [drawn(draw, dim) if draw(st.booleans()) else None for _ in reads]
    logits = drawn(draw, sequences, heads * 2)
    got = decode.mix(reads, (norms[0], norms[1]), logits, 1e-6)
    gates = logits.view(sequences, 1, heads, 2).sigmoid()
    normed = [
        x if w is None else F.rms_norm(x, (dim,), w, 1e-6)
        for x, w in zip(reads, norms, strict=True)
    ]
    close(got, (gates[..., :1] * normed[0] + gates[..., 1:] * normed[1]).flatten(2))


@given(st.data())
def test_a_token_competes_as_in_topk(data: st.DataObject) -> None:
    """Tokens one by one, with equal scores, infinities, NaN and tokens that do not compete."""
    draw = data.draw
    sequences, heads, k = (draw(st.integers(1, 3)) for _ in range(3))
    k = draw(st.sampled_from([1, 2, 5, 9]))
    scores = st.sampled_from([0.0, 1.0, 2.0, float("inf"), -float("inf"), float("nan")])
    ledgers = [topk.empty_ledger(k, sequences, heads) for _ in range(2)]
    for at in range(draw(st.integers(1, 8))):
        values = draw(st.lists(scores, min_size=sequences * heads, max_size=sequences * heads))
        score = torch.tensor(values).view(sequences, 1, heads)
        pauses = draw(st.lists(st.booleans(), min_size=sequences, max_size=sequences))
        position = torch.where(torch.tensor(pauses), -1, at).to(torch.int32)
        new = position[:, None, None].expand(score.shape)
        right = topk.compete(score, ledgers[1], new, k)
        with chosen_as_on_a_gpu(), patch.object(kernels, "COMPETING", 4):  # blocks of 4 slots
            got = topk.compete(score, ledgers[0], new, k)
        ledgers = [got[2], right[2]]
        assert torch.equal(got[0], right[0])
        for one, other in zip((*got[1], *got[2]), (*right[1], *right[2]), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 1, 3, 8).to(dtype), torch.randn(8).to(dtype)
    position = torch.tensor([[3], [70_000]], dtype=torch.int32)
    frequency = 1e4 ** (-torch.arange(4) / 4)
    part = decode.Heads(x, weight=weight, eps=1e-6, turns=True)
    ((got,), _) = decode.heads([part], None, decode.Rotation(position, frequency))
    right = rotate(F.rms_norm(x.float(), (8,), weight.float(), 1e-6), position, 1e4)
    assert torch.equal(got, right.to(dtype))


def decoded(layer: hb.HAMLayer, x: Tensor, prompt: int) -> list[Tensor]:
    """What a layer gives for tokens one by one after a prompt, and what its state holds then."""
    with torch.no_grad():
        state = layer.prefill(x[:, :prompt], layer.init_state(len(x), page_size=4)).state
        state.reserve(x.shape[1] - prompt)
        ys = []
        for t in range(prompt, x.shape[1]):
            y, state, _ = layer.decode(x[:, t], state)
            ys.append(y)
    return [*ys, *leaves(state.trees)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "reference"])
def test_every_layer_decodes_as_without_the_kernels(case: str) -> None:
    size = Size(0, 1, 7, (2, 1))
    layer, x = build(case, size), inputs(size)
    right = decoded(layer, x, 5)
    with chosen_as_on_a_gpu(), without_values():
        got = decoded(layer, x, 5)
    assert len(got) == len(right)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def launched_heads(layer: hb.HAMLayer) -> int:
    """How often a decoded token runs the kernel of heads."""
    x = torch.randn(1, 3, layer.dims.hidden_size, dtype=F64)
    with (
        chosen_as_on_a_gpu(),
        patch.object(kernels, "launch_heads", wraps=kernels.launch_heads) as heads,
        torch.no_grad(),
    ):
        layer.decode(x[:, 2], layer.prefill(x[:, :2]).state)
    return heads.call_count


def test_weights_that_hooks_may_change_are_read_in_their_own_calls() -> None:
    def layer() -> hb.HAMLayer:
        torch.manual_seed(0)
        return hb.HAMLayer(16, 2, selector=hb.Window(4)).double().eval()

    assert launched_heads(layer()) == 2  # the memory's, and attention's
    for name in ("memory.conv", "attention.conv", "attention.q_norm"):
        hooked = layer()
        hooked.get_submodule(name).register_forward_pre_hook(lambda *_: None)
        assert launched_heads(hooked) == 1, name
