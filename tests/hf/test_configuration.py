"""The configuration: JSON in both directions, bad arguments, and what importing hamblocks loads."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hf_cases import SELECTORS, config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM, HAMModel
from hamblocks.models.policies import TABLE, complete, part_of, policy_of

POLICIES = [
    (
        "memory",
        {
            "type": "gated_delta_memory",
            "conv_size": 2,
            "conv_init": "identity",
            "conv_activation": None,
            "projections": "own",
            "num_heads": 4,
            "num_k_heads": 2,
            "head_dim": 4,
            "expand_v": 2.0,
            "allow_neg_eigval": True,
            "qk_l2norm_eps": 1e-6,
            "A_init_range": [1.0, 2.0],
            "dt_min": 0.002,
            "dt_max": 0.002,
            "impl": "auto",
        },
    ),
    (
        "memory",
        {
            "type": "delta_memory",
            "conv_size": 4,
            "conv_init": "uniform",
            "conv_activation": "silu",
            "projections": "shared",
            "num_heads": None,
            "num_k_heads": None,
            "head_dim": None,
            "expand_v": 1,
            "allow_neg_eigval": False,
            "qk_l2norm_eps": 0,
            "impl": "reference",
        },
    ),
    ("gate", {"type": "prediction_error", "metric": "l2"}),
    ("gate", {"type": "learned_router", "width": 3, "gradient": "bias"}),
    ("gate", {"type": "learned_router", "width": None, "gradient": "straight_through"}),
    ("gate", {"type": "random_gate", "seed": 7, "per": "position", "heads": "own"}),
    ("gate", {"type": "committed_write"}),
    ("gate", {"type": "recall_error"}),
    ("gate", {"type": "key_norm"}),
    ("gate", {"type": "value_norm"}),
    ("gate", {"type": "given_score"}),
    ("gate", {"type": "prediction_entropy", "vocab_size": 17}),
    (
        "gate",
        {
            "type": "weighted_sum",
            "gates": [
                {"type": "prediction_error", "metric": "l2"},
                {"type": "shared_gate", "gate": {"type": "committed_write"}},
                {
                    "type": "weighted_sum",
                    "gates": [{"type": "recall_error"}],
                    "weights": [-1.0],
                },
            ],
            "weights": [1.0, 0.5, 2.0],
        },
    ),
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
    (
        "selector",
        {
            "type": "threshold",
            "controller": {
                "type": "annealed_fraction",
                "fraction": 0.1,
                "steps": 100,
                "start": 0.9,
                "begin": 5,
                "rate": 0.5,
                "freeze_at": None,
            },
        },
    ),
    (
        "selector",
        {
            "type": "threshold",
            "controller": {
                "type": "elastic_fraction",
                "low": 0.1,
                "high": 0.9,
                "seed": 3,
                "begin": 5,
                "spacing": "uniform",
            },
        },
    ),
    ("selector", {"type": "head_thresholds", "taus": [float("-inf"), 0.5, float("inf")]}),
    ("selector", {"type": "window", "width": 64}),
    ("selector", {"type": "first_tokens", "n": 4}),
    ("selector", {"type": "top_k", "k": 32, "delay": 8}),
    ("selector", {"type": "prompt_fraction", "fraction": 0.1, "length": 30}),
    ("selector", {"type": "error_mass", "share": 0.5, "capacity": 64}),
    (
        "selector",
        {"type": "sublinear_growth", "exponent": 0.5, "scale": 2.0, "max_tokens": 4096},
    ),
    (
        "selector",
        {
            "type": "budget",
            "inner": {
                "type": "cooldown",
                "inner": {
                    "type": "threshold",
                    "controller": {"type": "target_fraction", "fraction": 0.1, "rate": 0.5},
                },
                "n": 4,
            },
            "tokens": 128,
            "leaves": "lowest",
        },
    ),
    (
        "memory",
        {
            "type": "unstored_memory",
            "inner": complete("memory", {"type": "delta_memory", "conv_size": 3}),
        },
    ),
    (
        "attention",
        {
            "type": "selected_attention",
            "conv_size": 2,
            "conv_init": "uniform",
            "conv_values": True,
            "rope_theta": 50.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "partial_rotary_factor": 0.5,
            "qk_norm": False,
            "norm_eps": 0.1,
            "null_sink": True,
            "impl": "auto",
        },
    ),
    (
        "query_gate",
        {
            "type": "threshold_queries",
            "gate": {"type": "prediction_error", "metric": "l2"},
            "controller": {"type": "fixed_threshold", "tau": 0.3},
            "window": 8,
        },
    ),
    ("combiner", {"type": "gated_sum", "output_gate": True, "read_norm": False}),
    (
        "combiner",
        {
            "type": "scaled_sum",
            "bias": True,
            "read_norm": False,
            "start": "memory",
            "norm_eps": 1e-5,
            "memory_gate": "silu",
            "attention_gate": "sigmoid",
        },
    ),
    ("combiner", {"type": "softmax_mix", "output_gate": False, "read_norm": True}),
    (
        "selector",
        {
            "type": "any_of",
            "of": [
                {"type": "top_k", "k": 2, "delay": 0},
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
    part = part_of(kind, json.loads(json.dumps(policy)))
    assert type(part) is TABLE[kind][policy["type"]]
    assert policy_of(kind, part) == complete(kind, policy) == policy


def test_every_part_in_the_table_was_tried():
    tried = {(kind, policy["type"]) for kind, policy in POLICIES}
    tried |= {
        ("controller", "fixed_threshold"),
        ("controller", "target_fraction"),
        ("controller", "annealed_fraction"),
        ("controller", "elastic_fraction"),
        ("selector", "all_of"),
        ("selector", "cooldown"),
    }
    assert tried == {(kind, name) for kind, names in TABLE.items() for name in names}


def test_a_list_of_parts_is_a_list():
    one = {"type": "weighted_sum", "gates": {"type": "recall_error"}, "weights": [1.0]}
    with pytest.raises(ValueError, match=r'^gate weighted_sum: expected a list as "gates", got '):
        complete("gate", one)
    nested = {"type": "weighted_sum", "gates": [{"type": "random"}], "weights": [1.0]}
    with pytest.raises(ValueError, match=r"^gate: expected one of .*, got 'random'"):
        complete("gate", nested)


def test_numbers_out_of_numpy_are_those_of_json():
    made = [
        hb.Threshold(np.float32(0.5)),
        hb.Threshold(hb.TargetFraction(np.float64(0.25), rate=np.float32(0.5))),
        hb.Threshold(hb.AnnealedFraction(np.float32(0.25), np.int64(9), freeze_at=np.int32(20))),
        hb.Threshold(hb.ElasticFraction(np.float64(0.1), seed=np.int64(3), begin=np.int16(2))),
        hb.TopK(np.arange(8, 9)[0]),
        hb.Window(np.int64(4)) | hb.FirstTokens(np.int32(2)),
    ]
    for selector in made:
        policy = policy_of("selector", selector)
        assert json.loads(json.dumps(policy)) == policy
        assert policy_of("selector", part_of("selector", policy)) == policy
    given = config(hidden_size=np.int64(16), vocab_size=np.prod([2, 16]))
    assert json.loads(given.to_json_string())["hidden_size"] == 16
    assert complete("controller", np.float32(0.25)) == {"type": "fixed_threshold", "tau": 0.25}


def test_what_is_left_out_is_completed():
    assert complete("memory", {"type": "delta_memory"}) == {
        "type": "delta_memory",
        "conv_size": 4,
        "conv_init": "uniform",
        "conv_activation": "silu",
        "projections": "shared",
        "num_heads": None,
        "num_k_heads": None,
        "head_dim": None,
        "expand_v": 1,
        "allow_neg_eigval": False,
        "qk_l2norm_eps": 0,
        "impl": "auto",
    }
    assert complete("controller", 0.25) == {"type": "fixed_threshold", "tau": 0.25}
    a, b, c = hb.Window(1), hb.FirstTokens(2), hb.TopK(3)
    assert [side["type"] for side in policy_of("selector", (a | b) | c)["of"]] == [
        "window",
        "first_tokens",
        "top_k",
    ]
    assert policy_of("selector", a | (b & c))["of"][1]["type"] == "all_of"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate": {"type": "surprise"}},
            r"^gate: expected one of committed_write, .*, got 'surprise'",
        ),
        ({"gate": {}}, r"^gate: expected an object with one of committed_write, .* as \"type\""),
        (
            {"selector": "window"},
            r"^selector: expected one of hamblocks' own parts \(all_of, any_of, budget, cooldown,",
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
            r"^combiner gated_sum: expected the arguments output_gate \(optional\), .*, got n",
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


ATTENTION = {"type": "selected_attention"}


@pytest.mark.parametrize(
    "attention",
    [
        hb.SelectedAttention(),
        hb.SelectedAttention(rope_theta=None),
        {**ATTENTION, "rope_theta": 10_000.0},
        [ATTENTION, hb.SelectedAttention(), ATTENTION],
        [hb.SelectedAttention(rope_theta=2.0), None, None],
    ],
)
@pytest.mark.parametrize("rope_theta", [5e5, [5e5, 5e5, 7.0]])
def test_two_values_of_rope_theta_are_refused(attention, rope_theta):
    with pytest.raises(ValueError, match=r"^rope_theta: expected .*policy of attention.*, got "):
        config(attention=attention, rope_theta=rope_theta)


PART = hb.SelectedAttention(rope_theta=5e5)
ONE_THETA = [
    ({}, 1e4),
    ({"rope_theta": 5e5}, 5e5),
    ({"rope_theta": None}, None),
    ({"rope_theta": 5e5, "attention": {**ATTENTION, "qk_norm": False}}, 5e5),
    ({"rope_theta": 5e5, "attention": PART}, 5e5),
    ({"rope_theta": None, "attention": hb.SelectedAttention(rope_theta=None)}, None),
    ({"attention": PART}, 5e5),
    ({"attention": hb.SelectedAttention(rope_theta=None)}, None),
    ({"attention": [PART] * 3}, 5e5),
    ({"attention": [None, PART, ATTENTION]}, [1e4, 5e5, 1e4]),
    ({"rope_theta": [2.0, None, 3.0]}, [2.0, None, 3.0]),
    ({"rope_theta": (2.0, 2.0, 2.0)}, 2.0),
    ({"rope_theta": [2.0, 5e5, 3.0], "attention": [ATTENTION, PART, None]}, [2.0, 5e5, 3.0]),
]


@pytest.mark.parametrize(("changes", "rope_theta"), ONE_THETA)
def test_rope_theta_stated_once_holds_in_both_places(changes, rope_theta, tmp_path):
    made = config(**changes)
    made.save_pretrained(tmp_path)
    for one in (made, HAMConfig.from_pretrained(tmp_path)):
        assert one.rope_theta == rope_theta
        assert type(one.rope_theta) in (float, list, type(None))
        of_layers = [one.policy("attention", layer)["rope_theta"] for layer in range(3)]
        assert of_layers == (rope_theta if isinstance(rope_theta, list) else [rope_theta] * 3)
    layers = HAMForCausalLM(made).model.stack.layers
    assert [layer.attention.rope_theta for layer in layers[1:]] == of_layers[1:]


@pytest.mark.parametrize(
    "saved", [{}, {"attention": PART}, {"attention": [None, PART, None]}, {"rope_theta": 2.0}]
)
@pytest.mark.parametrize(
    ("changes", "rope_theta"),
    [
        ({"rope_theta": 7.0}, 7.0),
        ({"attention": hb.SelectedAttention(rope_theta=8.0)}, 8.0),
        ({"rope_theta": 9.0, "attention": ATTENTION}, 9.0),
    ],
)
def test_rope_theta_changed_while_loading_holds_in_both_places(
    saved, changes, rope_theta, tmp_path
):
    config(**saved).save_pretrained(tmp_path)
    for auto in (HAMConfig, AutoConfig):
        loaded = auto.from_pretrained(tmp_path, **changes)
        assert loaded.rope_theta == rope_theta
        assert all(loaded.policy("attention", n)["rope_theta"] == rope_theta for n in range(3))


def test_rope_theta_changed_in_one_place_later_is_refused_by_the_model():
    made = config()
    made.rope_theta = 5e5
    with pytest.raises(ValueError, match=r"^rope_theta: expected 10000.0, .* got 500000.0"):
        HAMForCausalLM(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"^num_heads: expected no such .* num_attention_heads\), got int 4"),
        ({"num_kv_heads": 2}, r"^num_kv_heads: expected no such .* num_key_value_heads\)"),
        ({"num_layers": 3}, r"^num_layers: expected no such .* num_hidden_layers\)"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            r"^rope_parameters: expected .* rope_theta, and rope_scaling in ",
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            r"^rope_scaling: expected .* in the policy of attention\)",
        ),
        ({"rope_theta": [1.0, 2.0]}, r"^rope_theta: expected one number, or num_hidden_layers = 3"),
    ],
)
def test_a_number_has_one_name(changes, message):
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
        type(None),
    ]
    assert [type(layer.attention) for layer in layers] == [
        type(None),
        hb.SelectedAttention,
        hb.SelectedAttention,
    ]
    assert type(layers[1].selector) is hb.TopK


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_importing_hamblocks_needs_torch_alone():
    run(
        "import sys, hamblocks; assert 'transformers' not in sys.modules;"
        # a configuration is registered, and models cost no time before there is one
        "import hamblocks.models; assert 'transformers.modeling_utils' not in sys.modules;"
        "hamblocks.models.HAMConfig; from transformers import AutoModel;"
        "AutoModel._model_mapping[hamblocks.models.HAMConfig]"
    )
    with pytest.raises(AttributeError, match="no attribute 'HAMFor'"):
        hb.models.HAMFor  # noqa: B018


def test_a_transformers_that_is_too_old_is_named(tmp_path):
    (tmp_path / "transformers.py").touch()  # without the names that the models import
    run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import hamblocks.models\n"
        "try:\n    hamblocks.models.HAMConfig\n"
        "except ImportError as error:\n"
        "    assert 'HAMConfig needs transformers 5.6 or later' in str(error)\n"
        "else:\n    raise SystemExit(1)"
    )


def test_a_transformers_that_fails_is_an_error_for_its_users_alone(tmp_path):
    (tmp_path / "transformers.py").write_text("raise FutureWarning('as an error')")
    run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import hamblocks.models\n"
        "assert hamblocks.Window(3).width == 3\n"
        "try:\n    hamblocks.models.HAMConfig\n"
        "except FutureWarning:\n    pass\n"
        "else:\n    raise SystemExit(1)"
    )
