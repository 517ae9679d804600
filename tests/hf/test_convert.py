"""A converted model computes what its source computes, until it is trained or stores less."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hf_cases import config, greedy, padded, rows, text
from source_cases import SOURCES, InFloat64, logits, source
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.models import HAMConfig, HAMForCausalLM, convert, convert_recorded
from hamblocks.models.loading import gguf_of_package, load_pretrained
from hamblocks.testing.budget import assert_same

EVERYTHING = -math.inf
SELECTOR = hb.TopK(6) | hb.Window(4)


def everything() -> hb.Threshold:
    return hb.Threshold(EVERYTHING)


def moved(model: HAMForCausalLM, seed: int = 0) -> HAMForCausalLM:
    """The model with every new weight moved, so that its memory is read."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "combiner.gate_proj" in name or "memory" in name:
                weight += 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@torch.no_grad()
def run(model: HAMForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_the_source(name):
    old, ids = source(name), text(1, 2, 40)
    expected = logits(old, ids)
    for layers in (None, [1]):
        model = convert(old, selector=everything(), layers=layers)
        assert model.dtype == torch.float64
        assert not model.training
        torch.testing.assert_close(run(model, ids), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama biased tied", "llama yarn", "qwen3", "smollm3", "qwen3_next dense"]
)
def test_logits_differ_by_rounding_in_narrow_dtypes(name, dtype):
    old, ids = source(name, dtype), text(1, 2, 24)
    model = convert(old, selector=everything())
    assert_same(
        {"logits": run(model, ids)},
        {"logits": logits(old, ids)},
        lambda: {"logits": logits(old, ids)},
    )
    wide = {name for name, weight in model.named_parameters() if weight.dtype != dtype}
    expected = {"A_log", "dt_bias"} if dtype == torch.bfloat16 else set()
    assert {name.split(".")[-1] for name in wide} == expected


def test_dynamic_scaling_beyond_the_original_length_is_that_of_decoding():
    old, ids = source("llama dynamic", max_position_embeddings=16), text(1, 1, 40)
    model = convert(old, selector=everything())
    cache, expected = None, []
    for column in ids.T:
        with InFloat64(), torch.no_grad():
            out = old(column[:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(out.logits)
    torch.testing.assert_close(run(model, ids), torch.cat(expected, 1), rtol=1e-9, atol=1e-9)


def test_a_selector_that_stores_less_changes_the_logits_and_a_memory_too():
    old, ids = source("llama"), text(1, 2, 24)
    expected = logits(old, ids)
    assert not torch.allclose(run(convert(old, selector=hb.Window(4)), ids), expected)
    model = convert(old, selector=everything())
    torch.testing.assert_close(run(model, ids), expected)
    assert not torch.allclose(run(moved(model), ids), expected)


def test_the_source_stays_as_it_was_and_shares_nothing():
    old = source("llama biased tied")
    before = {name: weight.clone() for name, weight in old.state_dict().items()}
    model = convert(old, selector=SELECTOR)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    for name, weight in old.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama yarn", "smollm3", "qwen3"])
def test_generate_is_argmax_over_full_passes(name):
    model = moved(convert(source(name), selector=SELECTOR, layers=[0, 2]))
    prompts = rows(1, [3, 9, 1, 6])
    ids, mask = padded(prompts)
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, **how)
    for row, prompt in enumerate(prompts):
        assert torch.equal(out[row, ids.shape[1] - len(prompt) :], greedy(model, prompt, 8))
    beams = model.generate(ids, num_beams=3, **how)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **how))


def test_a_fork_goes_its_own_way():
    model, ids = moved(convert(source("qwen2"), selector=SELECTOR)), text(1, 2, 20)
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        twin = cache.fork()
        model(text(2, 2, 8), past_key_values=cache)
        ahead = model(ids[:, 12:], past_key_values=twin).logits
    torch.testing.assert_close(ahead, run(model, ids)[:, 12:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama biased tied", "llama llama3", "smollm3"])
def test_a_saved_model_is_loaded_as_it_was(name, tmp_path):
    made = convert_recorded(source(name), selector=SELECTOR, layers=[0])
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, HAMForCausalLM)
    assert loaded.config.to_dict()["attention"] == made.model.config.to_dict()["attention"]
    ids = text(1, 2, 20)
    assert torch.equal(run(loaded, ids), run(made.model, ids))
    assert loaded.generation_config.to_dict() == made.model.generation_config.to_dict()


def test_every_weight_is_copied_or_new():
    old = source("qwen3")
    made = convert_recorded(old, selector=SELECTOR, layers=[1, 2])
    names = {name for name, _ in made.model.named_parameters()}
    assert names == made.copied.keys() | set(made.new)
    assert {name for names in made.copied.values() for name in names} == old.state_dict().keys()
    assert all(".memory." in name or ".combiner." in name for name in made.new)
    memories = [name for name in made.new if ".memory." in name]
    assert {name.split(".")[3] for name in memories} == {"1", "2"}
    assert made.layers == [1, 2]


def test_parts_of_ones_own_choice():
    model = convert(
        source("llama"),
        selector=[hb.TopK(k) | hb.Window(2) for k in (1, 2, 3)],
        gate={"type": "learned_router"},
        memory=hb.DeltaMemory(conv_size=1),
    )
    assert [policy["of"][0]["k"] for policy in model.config.selector] == [1, 2, 3]
    assert model.config.gate["type"] == "learned_router"
    layer = model.model.stack.layers[1]
    assert isinstance(layer.memory, hb.DeltaMemory)
    assert isinstance(layer.gate, hb.LearnedRouter)


def test_gradients_reach_the_new_weights():
    model = convert(source("llama"), selector=SELECTOR)
    moved(model).train()
    model(text(1, 2, 12), labels=text(2, 2, 12)).loss.backward()
    idle = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    # a memory's first tap acts on the token itself, and so do all others; nothing is idle
    assert idle == []


@pytest.mark.parametrize(
    ("kind", "memory", "bias"),
    [
        ("hybrid", {"type": "delta_memory"}, [0.0, 1.0] * 4),
        ("full_attention", {"type": "delta_memory"}, [1.0] * 4),
        ("linear_attention", {"type": "delta_memory"}, [1.0] * 4),
        (
            "hybrid",
            {"type": "delta_memory", "projections": "own", "num_heads": 2},
            [0.0] * 2 + [1.0] * 4,
        ),
    ],
)
def test_a_scaled_sum_starts_at_attention_alone(kind, memory, bias):
    made = HAMForCausalLM(
        config(
            num_hidden_layers=1,
            layer_types=[kind],
            memory=memory,
            combiner={"type": "scaled_sum"},
            initializer_range=0.3,
        )
    )
    gate = made.model.stack.layers[0].combiner.gate_proj
    assert gate.bias.tolist() == bias
    assert not gate.weight.any()


def test_a_memory_of_other_sizes_changes_nothing_at_first():
    old, ids = source("llama"), text(1, 2, 24)
    memory = hb.GatedDeltaMemory(projections="own", num_heads=2, head_dim=6)
    model = convert(old, selector=everything(), memory=memory)
    torch.testing.assert_close(run(model, ids), logits(old, ids), rtol=1e-9, atol=1e-9)


# refusals


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mistral", {"sliding_window": 8}, "config.sliding_window: expected None"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "config.sliding_window"),
        ("mixtral", {"router_jitter_noise": 0.1}, "config.router_jitter_noise: expected 0"),
        ("llama", {"attention_dropout": 0.1}, "config.attention_dropout: expected 0"),
        ("llama", {"hidden_act": "gelu"}, "config.hidden_act: expected silu"),
        ("llama", {"final_logit_softcapping": 30.0}, "config.final_logit_softcapping"),
        ("llama", {"attention_multiplier": 0.5}, "config.attention_multiplier: expected no field"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 100.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            "rope_scaling: expected",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "factor": 2.0}},
            "config.rope_parameters: expected rope_theta alone",
        ),
    ],
)
def test_what_would_be_lost_is_named(name, changes, named):
    with pytest.raises(ValueError, match="^" + re.escape(named)):
        convert(source(name, torch.float32, **changes), selector=SELECTOR)


def test_a_layer_type_that_is_changed_later_is_named():
    old = source("smollm3", torch.float32)
    old.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(
        ValueError, match=r"^config.layer_types: expected full_attention in layer 1"
    ):
        convert(old, selector=SELECTOR)


def test_other_architectures_and_modules_are_named():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))
    with pytest.raises(ValueError, match=r"^config.attn_logit_softcapping"):
        convert(gemma, selector=SELECTOR)
    gemma.config.attn_logit_softcapping = gemma.config.final_logit_softcapping = None
    gemma.config.sliding_window, gemma.config.layer_types = None, ["full_attention"]
    gemma.config.hidden_act = "silu"
    with pytest.raises(ValueError, match=r"^model: expected one of LlamaForCausalLM"):
        convert(gemma, selector=SELECTOR)
    with pytest.raises(ValueError, match=r"^model: expected a model of transformers"):
        convert(nn.Linear(2, 2), selector=SELECTOR)

    class Adapter(nn.Linear):
        pass

    old = source("llama", torch.float32)
    old.model.layers[1].self_attn.q_proj = Adapter(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"^model\.model\.layers\.1\.self_attn\.q_proj"):
        convert(old, selector=SELECTOR)


def test_weights_without_a_place_are_named():
    old = source("llama", torch.float32)
    old.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match=r"^model: self_attn: expected a bias in all of o_proj"):
        convert(old, selector=SELECTOR)
    old = source("llama", torch.float32)
    old.model.register_parameter("sink", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"got model.sink"):
        convert(old, selector=SELECTOR)
    old = source("llama biased tied", torch.float32)
    old.lm_head.weight = nn.Parameter(old.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"^model\.lm_head: expected the weight of"):
        convert(old, selector=SELECTOR)


@pytest.mark.parametrize("layers", [[], [3], [0, 0], [-1], [True], ["0"]])
def test_bad_layers_are_named(layers):
    with pytest.raises((ValueError, TypeError), match=r"^layers"):
        convert(source("llama", torch.float32), selector=SELECTOR, layers=layers)


def test_a_configuration_states_a_scaling_in_one_place():
    for name in ("rope_scaling", "rope_parameters", "attention_bias"):
        with pytest.raises(ValueError, match=f"^{name}: expected no such argument"):
            HAMConfig(**{name: {"rope_type": "linear", "factor": 2.0}})
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = HAMConfig(attention={"type": "selected_attention", "rope_scaling": scaling})
    assert config.attention["rope_scaling"] == scaling
    scaling["factor"] = 3.0
    assert config.attention["rope_scaling"]["factor"] == 2.0


# the command


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_converts_a_folder(tmp_path):
    old = source("qwen2", torch.float32)
    old.save_pretrained(tmp_path / "old")
    code, output = invoke(
        tmp_path / "old",
        tmp_path / "new",
        "--selector",
        "Threshold(-inf) | Window(4)",
        "--gate",
        json.dumps({"type": "prediction_error", "metric": "l2"}),
        "--layers",
        "0,2-2",
    )
    assert code == 0, output
    assert "qwen2: 2 hybrid layers" in output
    assert "weights are new" in output
    assert "until its thresholds are set" not in output  # these are fixed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.config.layer_types == ["hybrid", "full_attention", "hybrid"]
    ids = text(1, 2, 20)
    torch.testing.assert_close(run(loaded, ids), logits(old, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--selector", "Windw(4)"], "selector: expected an expression"),
        (["--selector", "{"], "selector: expected JSON"),
        (["--selector", "Window(4)", "--layers", "0-9"], "layers: expected indices below 3"),
        (["--selector", "Window(4)", "--layers", "a"], "layers: expected indices and ranges"),
        (["--selector", "Window(4)", "--dtype", "int8"], "dtype: expected float32"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, named, tmp_path):
    source("llama", torch.float32).save_pretrained(tmp_path / "old")
    code, output = invoke(tmp_path / "old", tmp_path / "new", *arguments)
    assert code == 2
    assert named in " ".join(output.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


def test_the_command_does_not_overwrite_its_source(tmp_path, monkeypatch):
    source("llama", torch.float32).save_pretrained(tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    monkeypatch.chdir(tmp_path)
    code, output = invoke("old", tmp_path / "old", "--selector", "Window(4)")
    assert code == 2
    assert "out: expected another folder than the source" in " ".join(
        output.replace("│", " ").split()
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


def test_a_source_that_is_not_there_is_named(tmp_path):
    for name in (str(tmp_path / "none.gguf"), str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"^source: expected"):
            load_pretrained(name)
    assert gguf_of_package("hamblocks") is None


def test_a_source_without_all_its_weights_is_refused(tmp_path):
    old = source("llama", torch.float32)
    weights = old.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    old.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=rf"^source: expected .* all its weights, got .*{name}$"):
        load_pretrained(str(tmp_path))


def test_the_tokenizer_can_be_left_out(tmp_path):
    old = source("llama", torch.float32)
    old.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(str(tmp_path), tokenizer=False)
    assert tokenizer is None
    assert torch.equal(loaded.lm_head.weight, old.lm_head.weight)
