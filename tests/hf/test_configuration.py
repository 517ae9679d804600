"""The configuration: JSON in both directions, bad arguments, and what importing hamblocks loads."""

import json
import subprocess
import sys

import pytest
from hf_cases import SELECTORS, config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM, HAMModel
from hamblocks.models.policies import TABLE, complete, describe, make

POLICIES = [
    (
        "memory",
        {"type": "gated_delta_memory", "conv_size": 2, "allow_neg_eigval": True, "impl": "auto"},
    ),
    (
        "memory",
        {"type": "delta_memory", "conv_size": 4, "allow_neg_eigval": False, "impl": "reference"},
    ),
    ("gate", {"type": "prediction_error", "metric": "l2"}),
    ("gate", {"type": "learned_router", "width": 3}),
    ("gate", {"type": "learned_router", "width": None}),
    ("gate", {"type": "random_gate", "seed": 7}),
    ("gate", {"type": "periodic_gate", "n": 3, "offset": 1}),
    ("gate", {"type": "shared_gate", "gate": {"type": "prediction_error", "metric": "cosine"}}),
    ("selector", {"type": "threshold", "controller": {"type": "fixed_threshold", "tau": 0.3}}),
    (
        "selector",
        {
            "type": "threshold",
            "controller": {"type": "target_fraction", "fraction": 0.1, "rate": 0.5},
        },
    ),
    ("selector", {"type": "window", "width": 64}),
    ("selector", {"type": "first_tokens", "n": 4}),
    ("selector", {"type": "top_k", "k": 32}),
    (
        "attention",
        {"type": "selected_attention", "rope_theta": None, "qk_norm": False, "impl": "auto"},
    ),
    ("combiner", {"type": "gated_sum"}),
    ("combiner", {"type": "softmax_mix"}),
    (
        "selector",
        {
            "type": "any_of",
            "of": [
                {"type": "top_k", "k": 2},
                {
                    "type": "all_of",
                    "of": [{"type": "window", "width": 9}, {"type": "first_tokens", "n": 2}],
                },
                {
                    "type": "any_of",
                    "of": [{"type": "first_tokens", "n": 1}, {"type": "window", "width": 1}],
                },
            ],
        },
    ),
]


@pytest.mark.parametrize(("kind", "policy"), POLICIES)
def test_policies_are_read_in_both_directions(kind, policy):
    part = make(kind, json.loads(json.dumps(policy)))
    assert type(part) is TABLE[kind][policy["type"]].part
    assert describe(kind, part) == complete(kind, policy) == policy


def test_every_part_in_the_table_was_tried():
    tried = {(kind, policy["type"]) for kind, policy in POLICIES}
    tried |= {
        ("controller", "fixed_threshold"),
        ("controller", "target_fraction"),
        ("selector", "all_of"),
    }
    assert tried == {(kind, name) for kind, names in TABLE.items() for name in names}


def test_what_is_left_out_is_completed():
    assert complete("memory", {"type": "delta_memory"}) == {
        "type": "delta_memory",
        "conv_size": 4,
        "allow_neg_eigval": False,
        "impl": "auto",
    }
    assert complete("controller", 0.25) == {"type": "fixed_threshold", "tau": 0.25}
    a, b, c = hb.Window(1), hb.FirstTokens(2), hb.TopK(3)
    assert [side["type"] for side in describe("selector", (a | b) | c)["of"]] == [
        "window",
        "first_tokens",
        "top_k",
    ]
    assert describe("selector", a | (b & c))["of"][1]["type"] == "all_of"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate": {"type": "surprise"}},
            r"^gate: expected one of learned_router, .*, got 'surprise'",
        ),
        ({"gate": {}}, r"^gate: expected an object with one of learned_router, .* as \"type\""),
        (
            {"selector": "window"},
            r"^selector: expected one of hamblocks' own parts \(all_of, any_of, first_tokens,",
        ),
        (
            {"selector": {"type": "window"}},
            r"^selector window: expected the arguments width, got none",
        ),
        (
            {"selector": {"type": "window", "size": 3}},
            r"^selector window: expected the arguments width, got size",
        ),
        (
            {"memory": {"type": "delta_memory", "taps": 3}},
            r"^memory delta_memory: expected the arguments conv_size \(optional\), .*taps",
        ),
        (
            {"combiner": {"type": "gated_sum", "n": 1}},
            r"^combiner gated_sum: expected the arguments \(none\), got n",
        ),
        (
            {"selector": {"type": "any_of", "of": []}},
            r"^selector any_of: expected a list of two or more as \"of\"",
        ),
        ({"selector": {"type": "window", "width": -1}}, r"^width: expected an integer >= 0"),
        (
            {"selector": [{"type": "window", "width": 1}]},
            r"^selector: expected one policy, or num_hidden_layers = 3",
        ),
        ({"gate": lambda x, trace: None}, r"^gate: expected one of hamblocks' own parts .*layer="),
        (
            {"layer_types": ["hybrid"]},
            r"^layer_types: expected num_hidden_layers = 3 of them, got 1",
        ),
        (
            {"layer_types": ["ham"] * 3},
            r"^layer_types: expected only hybrid, linear_attention, full_attention, got ham",
        ),
        (
            {"hidden_size": 18},
            r"^hidden_size: expected a multiple of num_attention_heads = 4, or head_dim, got 18",
        ),
        ({"num_hidden_layers": 0}, r"^num_hidden_layers: expected an integer >= 1"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", SELECTORS)
def test_json_and_back(name, tmp_path):
    selectors = [SELECTORS[name](), hb.Window(3), hb.TopK(1)]
    made = config(selector=selectors, gate=hb.PredictionError("l2"), rope_theta=500.0)
    assert made.policy("selector", 1) == {"type": "window", "width": 3}
    assert made.policy("attention", 0)["rope_theta"] == 500.0
    made.save_pretrained(tmp_path)
    for loaded in (HAMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is HAMConfig
        assert loaded.to_diff_dict() == made.to_diff_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "ham"
    assert saved["selector"][1] == {"type": "window", "width": 3}


def test_infinite_thresholds_survive_json(tmp_path):
    config(selector=hb.Threshold(float("inf"))).save_pretrained(tmp_path)
    assert HAMConfig.from_pretrained(tmp_path).selector["controller"]["tau"] == float("inf")


def test_auto_classes_know_the_models():
    assert type(AutoModel.from_config(config())) is HAMModel
    assert type(AutoModelForCausalLM.from_config(config())) is HAMForCausalLM
    assert type(AutoConfig.for_model("ham")) is HAMConfig


def test_layers_are_what_layer_types_says():
    layers = HAMForCausalLM(config(selector=hb.TopK(2))).model.stack.layers
    assert [type(layer.memory) for layer in layers] == [
        hb.GatedDeltaMemory,
        hb.GatedDeltaMemory,
        hb.NoMemory,
    ]
    assert [type(layer.attention) for layer in layers] == [
        hb.NoAttention,
        hb.SelectedAttention,
        hb.SelectedAttention,
    ]
    assert type(layers[1].selector) is hb.TopK


def test_importing_hamblocks_needs_torch_alone():
    code = (
        "import sys, hamblocks, hamblocks.models; assert 'transformers' not in sys.modules;"
        "hamblocks.models.HAMConfig; from transformers import AutoModel;"
        "AutoModel._model_mapping[hamblocks.models.HAMConfig]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError, match="no attribute 'HAMFor'"):
        hb.models.HAMFor  # noqa: B018
