"""save_pretrained and from_pretrained are exact, for thresholds and a user's own parts too."""

import json

import pytest
import torch
from hf_cases import bits, buffers, config, model, text
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import hamblocks as hb
from hamblocks.models import HAMForCausalLM, HAMModel


def target():
    return hb.Threshold(hb.TargetFraction(0.3)) | hb.Window(2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loaded_model_is_the_saved_one(tmp_path, dtype, tied):
    made = model(dtype=dtype, selector=target(), tie_word_embeddings=tied)
    made.set_keep_fraction(0.4)
    made.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (
        HAMForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is HAMForCausalLM
        saved, got = made.state_dict(), loaded.state_dict()
        assert saved.keys() == got.keys()
        kept = (
            {name for name in saved if name.endswith(("A_log", "dt_bias"))}
            if dtype == torch.bfloat16
            else set()
        )
        for name in saved.keys() - kept:
            assert saved[name].dtype == got[name].dtype
            assert torch.equal(bits(saved[name]), bits(got[name])), name
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        ids = text(1, 2, 12)
        assert torch.equal(loaded(ids).logits, made(ids).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is HAMModel
    assert torch.equal(body(ids).last_hidden_state, made.model(ids).last_hidden_state)


def entropy_heads(made):
    return [x.head.weight for x in made.modules() if isinstance(x, hb.PredictionEntropy)]


@pytest.mark.parametrize("tied", [True, False])
def test_entropy_gates_predict_with_the_head_of_the_model(tmp_path, tied):
    policy = {
        "type": "weighted_sum",
        "gates": [{"type": "prediction_entropy", "vocab_size": 19}, {"type": "recall_error"}],
        "weights": [1.0, 0.5],
    }
    layers = ["linear_attention", "hybrid", "hybrid"]
    made = model(gate=policy, selector=hb.TopK(3), tie_word_embeddings=tied, layer_types=layers)
    made.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    for one in (made, loaded):
        assert len(entropy_heads(one)) == 2
        assert all(weight is one.lm_head.weight for weight in entropy_heads(one))
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied
    ids = text(1, 2, 12)
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    if tied:  # a body has the embedding alone
        body = HAMModel.from_pretrained(tmp_path)
        assert all(weight is body.embed_tokens.weight for weight in entropy_heads(body))
        assert torch.equal(body(ids).last_hidden_state, made.model(ids).last_hidden_state)
    loaded.resize_token_embeddings(23)
    assert all(weight is loaded.lm_head.weight for weight in entropy_heads(loaded))
    scores = [stats.score for stats in loaded(ids).stats if stats.score is not None]
    assert len(scores) == 2
    assert all(score.isfinite().all() for score in scores)
    with pytest.raises(ValueError, match=r"^weight: expected shape \[V, hidden_size\] = \[7, 16\]"):
        model(gate={"type": "prediction_entropy", "vocab_size": 7}, selector=hb.TopK(3))


def test_thresholds_stay_float32_in_bfloat16(tmp_path):
    made = model(dtype=torch.float32, selector=target())
    made.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = buffers(made), buffers(loaded)
    assert {name.rsplit(".")[-1] for name in before} >= {
        "tau_sum",
        "tau_weight",
        "target",
        "sampled",
        "quantiles",
    }
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(bits(after[name]), bits(buffer)), name
    for name, weight in loaded.named_parameters():
        wide = name.endswith(("A_log", "dt_bias"))
        assert weight.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert loaded(text(0, 1, 9)).logits.dtype == torch.bfloat16
    assert torch.equal(loaded.generate(text(0, 1, 9), max_new_tokens=3)[:, :9], text(0, 1, 9))


def test_what_a_checkpoint_lacks_begins_as_in_a_new_model(tmp_path):
    made = model(dtype=torch.float32, selector=hb.Window(2))
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [
        name
        for name in weights
        if name.endswith(("A_log", "dt_bias", "conv.weight", "gate_proj.bias"))
    ]
    save_file(
        {name: x for name, x in weights.items() if name not in lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    loaded, info = HAMForCausalLM.from_pretrained(
        tmp_path, selector=target(), output_loading_info=True
    )
    assert set(lost) <= set(info["missing_keys"])
    for module in loaded.modules():
        if isinstance(module, hb.TargetFraction):
            assert (module.fraction, float(module.tau), bool(module.started)) == (
                pytest.approx(0.3),
                -torch.inf,
                False,
            )
            assert module.sample.isnan().all()
        if isinstance(module, hb.FixedThreshold):
            assert module.tau.isinf()
        if isinstance(module, hb.GatedDeltaMemory):
            assert ((module.A_log.exp() >= 1) & (module.A_log.exp() < 16)).all()
            step = torch.nn.functional.softplus(module.dt_bias)
            assert ((step > 0.0009) & (step < 0.11)).all()
        if isinstance(module, hb.ShortConvolution):
            assert module.weight.abs().max() <= module.kernel_size**-0.5
            assert module.weight.std() > 0.1
        if isinstance(module, hb.GatedSum):
            assert not module.gate_proj.bias.any()
    assert loaded(text(0, 1, 9)).logits.isfinite().all()


def controllers(made, kind):
    return [module for module in made.modules() if isinstance(module, kind)]


HYBRID = {"layer_types": ["hybrid", "full_attention", "hybrid"]}


def test_the_configuration_says_what_was_changed_in_a_model(tmp_path):
    made = model(selector=target(), **HYBRID)
    for one in controllers(made, hb.TargetFraction):
        one.fraction = 0.4
    made.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    assert [one.fraction for one in controllers(loaded, hb.TargetFraction)] == [0.4, 0.4]
    assert loaded.config.selector["of"][0]["controller"]["fraction"] == 0.4
    # one layer alone
    controllers(loaded, hb.TargetFraction)[1].fraction = 0.1
    loaded.save_pretrained(tmp_path)
    of = AutoModel.from_pretrained(tmp_path).config.selector
    fractions = [policy["of"][0]["controller"]["fraction"] for policy in of]
    assert (fractions[0], fractions[2]) == (0.4, 0.1)


def test_the_keep_fraction_in_use_is_saved_and_leaves_the_target(tmp_path):
    made = model(selector=target(), **HYBRID)
    before = [float(one.tau) for one in controllers(made, hb.TargetFraction)]
    made.set_keep_fraction(0.1)
    made.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.selector["of"][0]["controller"]["fraction"] == 0.3
    for one, other, old in zip(
        *(controllers(x, hb.TargetFraction) for x in (made, loaded)), before, strict=True
    ):
        assert one.tau == other.tau > old
        assert other.fraction == 0.3


def test_the_configuration_says_a_fixed_threshold_as_it_was_given_or_changed(tmp_path):
    made = model(selector={"type": "threshold", "controller": 1 / 3}, **HYBRID)
    made.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.selector["controller"]["tau"] == 1 / 3  # not as float32 rounds it
    for layer in (0, 2):
        loaded.model.stack.layers[layer].selector.controller.set_threshold(-0.5)
    loaded.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.selector["controller"]["tau"] == -0.5


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (lambda: hb.Threshold(0.9), lambda: hb.Threshold(0.5)),
        (target, lambda: hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(2)),
    ],
    ids=["fixed", "target"],
)
def test_a_selector_that_contradicts_the_checkpoint_is_refused(tmp_path, saved, other):
    model(selector=saved(), **HYBRID).save_pretrained(tmp_path)
    for cls in (AutoModel, AutoModelForCausalLM):
        cls.from_pretrained(tmp_path, selector=saved())
        with pytest.raises(
            ValueError, match=r"^selector: expected that of the checkpoint in layer 0"
        ):
            cls.from_pretrained(tmp_path, selector=other())


class Bright(torch.nn.Module):
    """A user's gate with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.build_weight = torch.nn.Parameter(torch.full((16,), 0.5))
        self.proj = torch.nn.Linear(16, 1)
        torch.nn.init.constant_(self.proj.bias, 3.0)

    def forward(self, x, trace):
        return hb.GateOutput((self.proj(x * self.build_weight)).sigmoid())


def own_layer(index):
    return hb.HAMLayer(16, 4, num_kv_heads=2, gate=Bright(), selector=hb.TopK(index + 1))


def test_parts_of_a_users_own(tmp_path):
    made = HAMForCausalLM(config(), layer=own_layer)
    layers = made.model.stack.layers
    assert [layer.selector.k for layer in layers] == [1, 2, 3]
    # a user's weights keep their values; the model's own are initialised as the configuration says
    assert all(layer.gate.proj.bias.item() == 3.0 for layer in layers)
    assert made.config.own_layers
    assert made.config is made.model.config
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["own_layers"] is True
    ids = text(0, 2, 12)
    for cls in (HAMForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path, layer=own_layer)
        assert type(loaded.model.stack.layers[0].gate) is Bright
        assert torch.equal(loaded(ids).logits, made.eval()(ids).logits)
    with pytest.raises(ValueError, match=r"^layer: expected the function that made the layers"):
        HAMForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^layer: expected layers of hidden_size = 16, got layers of hidden_size = 8",
    ):
        HAMModel(config(), layer=lambda index: hb.HAMLayer(8, 2, selector=hb.Window(1)))


def sharing():
    """Makes layers that share one controller."""
    controller = hb.TargetFraction(0.3)
    return lambda index: hb.HAMLayer(
        16, 4, num_kv_heads=2, selector=hb.Threshold(controller) | hb.Window(2)
    )


def test_a_shared_controller_is_saved_once_and_stays_shared(tmp_path):
    made = model(dtype=torch.float32, layer=sharing())
    made.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("tau_sum")]
    assert names == ["model.stack.blocks.0.block.layer.selector.left.controller.tau_sum"]
    for cls in (HAMForCausalLM, HAMModel):
        loaded, info = cls.from_pretrained(tmp_path, layer=sharing(), output_loading_info=True)
        assert not info["missing_keys"]
        controllers = [
            module for module in loaded.modules() if isinstance(module, hb.TargetFraction)
        ]
        assert len(controllers) == 1
        assert controllers[0].tau == made.model.stack.layers[2].selector.left.controller.tau
        assert controllers[0].tau.isfinite()
    ids = text(0, 2, 12)
    assert torch.equal(loaded(ids).last_hidden_state, made.model(ids).last_hidden_state)


def test_a_larger_vocabulary():
    made = model(dtype=torch.float32)
    made.resize_token_embeddings(25)
    assert made.config.vocab_size == 25
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made(text(0, 1, 4) + 5).logits.shape == (1, 4, 25)


def test_a_configuration_is_not_changed_by_own_layers():
    given = config()
    HAMModel(given, layer=own_layer)
    assert not given.own_layers
