"""Rotary frequencies are those of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from source_cases import LENGTH, LLAMA3, MSCALE, InFloat64
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import hamblocks as hb
from hamblocks.rope import angles, frequencies, rotate

SCALINGS = {
    "linear": {"factor": 3.0},
    "llama3": LLAMA3,
    "llama3 short": {**LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 8.0, **LENGTH},
    "yarn factor": {"factor": 8.0, "attention_factor": 1.5, **LENGTH},
    "yarn mscale": {"factor": 8.0, "truncate": False, **LENGTH, **MSCALE},
    "yarn shorter": {"factor": 0.5, **LENGTH},
    "yarn one channel": {"factor": 8.0, "beta_fast": 1.0, "beta_slow": 1.0, **LENGTH},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(16, 100.0), (64, 1e6)])
def test_frequencies_are_those_of_transformers(name, dim, theta):
    kind, numbers = name.split()[0], SCALINGS[name]
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **numbers},
    )
    with InFloat64():
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config)
    scaling, none = {"rope_type": kind, **numbers}, torch.zeros(1, 1)
    got, own = frequencies(dim, theta, scaling, none, torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert own == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", [7, 16, 17, 100])
def test_dynamic_frequencies_are_those_of_a_text_that_ends_at_the_token(length):
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=1,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0},
    )
    with InFloat64():
        expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    scaling = {"rope_type": "dynamic", "factor": 4.0, **LENGTH}
    position = torch.arange(length)[None]
    got, _ = frequencies(16, 50.0, scaling, position, torch.float64)
    torch.testing.assert_close(got[0, -1], expected, rtol=1e-12, atol=0)


def test_the_attention_factor_multiplies_cosine_and_sine():
    x, position = torch.randn(1, 5, 1, 8, dtype=torch.float64), torch.arange(5)[None]
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0, **LENGTH}
    cos, sin = angles(x, position, 100.0, scaling)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 9.0))
    turned = rotate(x, position, 100.0, scaling)
    torch.testing.assert_close(turned.norm(dim=-1), 3 * x.norm(dim=-1))


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "linear, dynamic, llama3, yarn"),
        ({"factor": 2.0}, "rope_type"),
        (4.0, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor: expected a number > 0"),
        ({"rope_type": "linear", "factor": True}, "factor: expected a number > 0"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "got beta_fast, factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2.5}, "2.5"),
    ],
)
def test_a_bad_scaling_is_named(scaling, named):
    with pytest.raises(ValueError, match=r"^rope_scaling") as caught:
        hb.SelectedAttention(rope_scaling=scaling)
    assert named in str(caught.value)


@pytest.mark.parametrize("theta", [-1.0, 0.0, math.inf, math.nan, "a", [1.0]])
def test_a_bad_base_is_named(theta):
    with pytest.raises(ValueError, match=r"^rope_theta: expected None or a finite number > 0, got"):
        hb.SelectedAttention(rope_theta=theta)


def test_scaling_needs_positions_and_channels():
    scaling = {"rope_type": "dynamic", "factor": 2.0, **LENGTH}
    with pytest.raises(ValueError, match=r"^rope_scaling: expected None where rope_theta"):
        hb.SelectedAttention(rope_theta=None, rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"^head_dim: expected at least 4"):
        hb.HAMLayer(4, 2, memory=None, attention=hb.SelectedAttention(rope_scaling=scaling))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_the_first_channels_are_turned_alone(scaling):
    part = hb.SelectedAttention(
        conv_size=1,
        qk_norm=False,
        rope_theta=50.0,
        rope_scaling=scaling,
        partial_rotary_factor=0.25,
    )
    hb.HAMLayer(32, 2, memory=None, attention=part)
    q, k = torch.randn(2, 2, 5, 2, 16, dtype=torch.float64)
    position = torch.arange(5)[None]
    turned = part.prepare(q, k, k, position=position)
    for got, x in zip(turned[:2], (q, k), strict=True):
        expected = rotate(x[..., :4], position, 50.0, scaling)
        assert torch.equal(got, torch.cat([expected, x[..., 4:]], -1))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor: expected"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected"),
        ({"partial_rotary_factor": 0.375}, "head_dim . partial_rotary_factor: expected an even"),
        ({"partial_rotary_factor": 0.01}, "head_dim . partial_rotary_factor: expected an even"),
        (
            {"partial_rotary_factor": 0.25, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            "head_dim . partial_rotary_factor: expected at least 4",
        ),
    ],
)
def test_a_share_that_cannot_be_turned_is_named(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        hb.HAMLayer(16, 2, memory=None, attention=hb.SelectedAttention(**arguments))
