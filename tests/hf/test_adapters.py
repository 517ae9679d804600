"""LoRA by peft: thresholds that move while an adapter trains are in the adapter."""

import pytest
import torch
from hf_cases import config, text
from transformers import AutoModelForCausalLM

import hamblocks as hb
from hamblocks.controllers.tau import HasTau
from hamblocks.models import HAMForCausalLM

import peft


def taus(model):
    return [module.tau.item() for module in model.modules() if isinstance(module, HasTau)]


@pytest.mark.parametrize(
    "make",
    [lambda: hb.TargetFraction(0.25), lambda: hb.ElasticFraction(0.1)],
    ids=["target", "elastic"],
)
def test_an_adapter_holds_the_thresholds_that_it_trained_with(tmp_path, make):
    torch.manual_seed(0)
    base, ids = HAMForCausalLM(config(selector=hb.Threshold(make()))), text(0, 2, 24)
    base.train()
    base(ids, labels=ids)
    hb.step_controllers(base)
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    hb.hook_controllers(optimizer, model)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert taus(loaded) == taus(model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert taus(again) == taus(merged)
