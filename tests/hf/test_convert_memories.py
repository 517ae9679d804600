"""A source that has memories keeps them, and attention is added beside them: Qwen."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hf_cases import greedy, padded, rows, text
from source_cases import SOURCES, InFloat64, source
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hamblocks as hb
from hamblocks.models import HAMForCausalLM, convert, convert_recorded

NAMES = [name for name in SOURCES if name.startswith(("qwen3_next", "qwen3_5"))]
EVERYTHING = hb.Threshold(-math.inf)
SELECTOR = hb.TopK(6) | hb.Window(4)


@torch.no_grad()
def run(model: HAMForCausalLM, ids: Tensor, **given: Any) -> Tensor:
    return model(ids, use_cache=False, **given).logits


def mixed(model: HAMForCausalLM) -> HAMForCausalLM:
    """The model with weights of both reads that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "combiner.gate_proj" in name:
                weight += 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_the_tokens_of_the_source(name):
    old = source(name)
    model = convert(old, selector=EVERYTHING)
    ids, mask = padded(rows(1, [3, 9, 1, 6]))
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with InFloat64():
        expected = old.generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), expected)


def test_generate_is_argmax_over_full_passes_where_less_is_stored():
    model = mixed(convert(source("qwen3_next"), selector=SELECTOR))
    prompts = rows(1, [3, 9, 1, 6])
    ids, mask = padded(prompts)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(out[row, ids.shape[1] - len(prompt) :], greedy(model, prompt, 6))


def test_packed_sequences_are_those_one_by_one():
    model = mixed(convert(source("qwen3_next"), selector=SELECTOR))
    prompts = rows(1, [5, 1, 12])
    borders = torch.tensor([0, 5, 6, 18], dtype=torch.int32)
    packed = run(model, torch.cat(prompts)[None], cu_seq_lens_q=borders)
    alone = torch.cat([run(model, prompt[None]) for prompt in prompts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_stays_has_no_attention(name):
    kinds = convert(source(name), selector=EVERYTHING, layers=[2]).config.layer_types
    assert kinds == ["linear_attention", "full_attention", "hybrid"]
    model = convert(source(name), selector=EVERYTHING, layers=[1])
    assert model.config.layer_types == ["linear_attention", "hybrid", "linear_attention"]
    assert [layer.attention is None for layer in model.model.stack.layers] == [True, False, True]


def test_what_is_stored_matters_only_to_attention_of_the_source():
    old, ids = source("qwen3_next"), text(1, 2, 24)
    everything = run(convert(old, selector=EVERYTHING), ids)
    nothing = hb.Threshold(math.inf)
    # the new attention has the weight 0
    torch.testing.assert_close(
        run(convert(old, selector=nothing, layers=[0, 2]), ids), everything, rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(run(convert(old, selector=nothing, layers=[1]), ids), everything)
    model = mixed(convert(old, selector=EVERYTHING, layers=[0, 2]))
    assert not torch.allclose(run(model, ids), everything)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_loaded_as_it_was(name, tmp_path):
    made = mixed(convert(source(name), selector=SELECTOR, layers=[0, 1]))
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, HAMForCausalLM)
    for field in ("memory", "attention", "combiner", "mlp_layer_types", "num_experts"):
        assert getattr(loaded.config, field) == getattr(made.config, field)
    ids = text(1, 2, 20)
    assert torch.equal(run(loaded, ids), run(made, ids))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_copied_or_new(name):
    old = source(name)
    made = convert_recorded(old, selector=SELECTOR)
    names = {name for name, _ in made.model.named_parameters()}
    assert names == made.copied.keys() | set(made.new)
    kept = old.state_dict().keys() - ({"lm_head.weight"} if "dense" in name else set())
    assert {name for names in made.copied.values() for name in names} == kept
    # one size for both reads: they share a projection
    wide = {} if "dense" in name else {0: 32, 2: 32}
    assert {int(name.split(".")[3]): n for name, n in made.widened.items()} == wide


def test_gradients_reach_the_new_weights():
    model = mixed(convert(source("qwen3_next"), selector=SELECTOR)).train()
    model(text(1, 2, 24), labels=text(2, 2, 24)).loss.backward()
    idle = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert idle == []


def test_a_memory_is_given_to_layers_of_attention_alone():
    old = source("qwen3_next", torch.float32)
    model = convert(old, selector=SELECTOR, memory=hb.DeltaMemory())
    assert [type(layer.memory).__name__ for layer in model.model.stack.layers] == [
        "GatedDeltaMemory",
        "DeltaMemory",
        "GatedDeltaMemory",
    ]
    each = [None, hb.DeltaMemory(conv_size=2), None]
    assert convert(old, selector=SELECTOR, memory=each).config.memory[1]["conv_size"] == 2
    with pytest.raises(ValueError, match=r"^memory: expected None for layer 0, which has a memory"):
        convert(old, selector=SELECTOR, memory=[hb.DeltaMemory(), None, None])
    with pytest.raises(ValueError, match=r"^memory: expected one for each of 3 layers"):
        convert(old, selector=SELECTOR, memory=[None])


# refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"output_router_logits": True}, "config.output_router_logits: expected False"),
        ({"attention_dropout": 0.1}, "config.attention_dropout: expected 0"),
        ({"hidden_act": "gelu"}, "config.hidden_act: expected silu"),
        ({"attention_multiplier": 0.5}, "config.attention_multiplier: expected no field"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "mrope_section": [1]}},
            "config.rope_parameters: expected rope_theta alone",
        ),
    ],
)
def test_what_would_be_lost_is_named(changes, named):
    with pytest.raises(ValueError, match="^" + re.escape(named)):
        convert(source("qwen3_next", torch.float32, **changes), selector=SELECTOR)


def test_layers_and_weights_without_a_place_are_named():
    old = source("qwen3_next", torch.float32)
    old.config.layer_types = ["linear_attention", "chunked_attention", "linear_attention"]
    expected = r"^config.layer_types: expected linear_attention or full_attention in layer 1"
    with pytest.raises(ValueError, match=expected):
        convert(old, selector=SELECTOR)
    old = source("qwen3_next", torch.float32)
    old.model.layers[0].linear_attn.conv1d.bias = nn.Parameter(torch.zeros(80))
    with pytest.raises(ValueError, match=r"got model.layers.0.linear_attn.conv1d.bias"):
        convert(old, selector=SELECTOR)
    old = source("qwen3_next", torch.float32)
    old.model.layers[0].linear_attn.in_proj_ba = nn.Linear(32, 16, bias=False)
    with pytest.raises(ValueError, match=r"^model.model.layers.0.linear_attn.in_proj_ba.weight"):
        convert(old, selector=SELECTOR)
