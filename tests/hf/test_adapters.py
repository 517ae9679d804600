"""Adapters of peft: thresholds that move while an adapter trains are in the adapter."""

import peft
import pytest
import torch
from hf_cases import config, text
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hamblocks as hb
from hamblocks.controllers.tau import HasTau
from hamblocks.models import ControllerCallback, HAMForCausalLM

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = text(0, 2, 24)
HYBRID = ["hybrid"] * 3
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "lora of all layers": lambda: peft.LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def taus(model):
    """The thresholds in use, and what their samples add up to."""
    layers = [module for module in model.modules() if isinstance(module, hb.HAMLayer)]
    used = [layer.selector.controller for layer in layers]
    return [(one.tau.item(), one.quantiles.sum().item()) for one in used]


def trained(folder, make=lambda: hb.TargetFraction(0.25)):
    """A model after a training step, saved to a folder and loaded from it."""
    torch.manual_seed(0)
    base = HAMForCausalLM(config(selector=hb.Threshold(make()), layer_types=HYBRID)).train()
    base(IDS, labels=IDS)
    hb.step_controllers(base)
    base.save_pretrained(folder)
    return loaded(folder)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def train(model, steps=4):
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    handle = hb.hook_controllers(optimizer, model)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [lambda: hb.TargetFraction(0.25), lambda: hb.ElasticFraction(0.1)],
    ids=["target", "elastic"],
)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_holds_the_thresholds_that_it_trained_with(tmp_path, make, kind):
    base = trained(tmp_path / "base", make)
    before = taus(base)
    model = train(peft.get_peft_model(base, ADAPTERS[kind]()))
    assert taus(model) != before
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter").eval()
    assert taus(again) == taus(model)
    assert torch.equal(logits(again), logits(model))
    if kind != "prompt":  # of such an adapter, peft takes away the prompt alone
        with model.disable_adapter():
            assert taus(model) == before
            assert torch.equal(logits(model), logits(loaded(tmp_path / "base")))


def test_a_merged_model_has_the_thresholds_of_the_adapter(tmp_path):
    model = train(peft.get_peft_model(trained(tmp_path / "base"), ADAPTERS["lora"]()))
    expected, plain = taus(model), logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = loaded(tmp_path / "merged")
    assert taus(again) == taus(merged) == expected
    torch.testing.assert_close(logits(again), plain, rtol=1e-4, atol=1e-4)


def test_two_adapters_have_thresholds_of_their_own(tmp_path):
    base = trained(tmp_path / "base")
    before = taus(base)
    model = train(peft.get_peft_model(base, ADAPTERS["lora"]()))
    first, plain = taus(model), logits(model)
    model.add_adapter("second", ADAPTERS["lora"]())
    model.set_adapter("second")
    train(model, steps=2)
    second = taus(model)
    assert len({tuple(before), tuple(first), tuple(second)}) == 3
    model.set_adapter("default")
    assert taus(model) == first
    assert torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert taus(model) == before
    model.save_pretrained(tmp_path / "adapters")
    for folder, expected in (("adapters", first), ("adapters/second", second)):
        again = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / folder)
        assert taus(again) == expected


def test_an_adapter_that_transformers_adds(tmp_path):
    model = trained(tmp_path / "base")
    before = taus(model)
    model.add_adapter(ADAPTERS["lora"]())
    train(model)
    assert taus(model) != before
    model.save_pretrained(tmp_path / "adapter")
    # the folder of an adapter names its base model
    for again in (loaded(tmp_path / "adapter"), loaded(tmp_path / "base")):
        if taus(again) == before:
            again.load_adapter(tmp_path / "adapter")
        assert taus(again) == taus(model)
        assert torch.equal(logits(again), logits(model))


def test_the_users_own_modules_to_save_stay(tmp_path):
    adapter = peft.LoraConfig(**LORA, modules_to_save=["selector"])
    model = peft.get_peft_model(trained(tmp_path / "base"), adapter)
    train(model)
    expected = taus(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter")
    assert again.peft_config["default"].modules_to_save == ["selector"]
    assert taus(again) == expected


def test_the_trainer_resumes_with_the_thresholds_of_the_checkpoint(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in text(5, 8, 16)]

    def run(steps, **how):
        base = trained(tmp_path / "base")
        model = peft.get_peft_model(base, ADAPTERS["lora"]())
        by = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                max_steps=steps,
                save_steps=2,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                per_device_train_batch_size=2,
                lr_scheduler_type="constant",
            ),
            train_dataset=data,
            callbacks=[ControllerCallback()],
        )
        by.train(**how)
        used = taus(model)
        with model.disable_adapter():  # the base model is as it was
            assert taus(model) == taus(loaded(tmp_path / "base"))
        return used

    whole = run(4)
    assert run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == whole


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    shared = hb.TargetFraction(0.25)

    def layer(index):
        return hb.HAMLayer(16, 4, num_kv_heads=2, selector=hb.Threshold(shared))

    model = peft.get_peft_model(HAMForCausalLM(config(), layer=layer), ADAPTERS["lora"]())
    with pytest.raises(ValueError, match=r"^model: expected a controller of its own"):
        train(model)
    tokens = peft.TrainableTokensConfig(token_indices=[1], task_type="CAUSAL_LM")
    model = peft.get_peft_model(trained(tmp_path / "base"), tokens)
    with pytest.raises(ValueError, match=r"^model: .* got one of TrainableTokensConfig"):
        train(model)
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(trained(tmp_path / "base"), prefix)
    with pytest.raises(ValueError, match=r"^past_key_values: expected a HAMCache, got Dynamic"):
        logits(model)


def test_a_model_without_adapters_is_left_alone(tmp_path):
    base = trained(tmp_path / "base")
    names = [name for name, _ in base.named_modules()]
    train(base)
    assert [name for name, _ in base.named_modules()] == names
    assert all(isinstance(layer.selector.controller, HasTau) for layer in base.model.stack.layers)
