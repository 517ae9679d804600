"""Tensor parallel in transformers: models are loaded by their plan, and are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM

TOKENS, VOCAB = 13, 21


def config(**changed: Any) -> HAMConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    kinds = ["hybrid", "linear_attention", "full_attention"]
    selector = hb.Threshold(hb.FixedThreshold(0.9)) | hb.Window(3)
    given = {**sizes, **heads, "layer_types": kinds, "selector": selector} | changed
    return HAMConfig(**given)


def batch() -> torch.Tensor:
    return torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def results(model: Any) -> tuple[Any, ...]:
    tokens = batch()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    model.eval()
    made = model.generate(tokens[:, :4], max_new_tokens=8, do_sample=False)
    nothing = model(tokens[:, :0]).logits.detach()
    return output.logits.detach(), output.loss.detach(), made, nothing


def loaded(group: Any, path: Path) -> tuple[Any, ...]:
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    given = {"distributed_config": DistributedConfig(tp_size=4), "dtype": torch.float64}
    model: Any = HAMForCausalLM.from_pretrained(path, **given)
    rows = model.model.stack.layers[0].q_proj.weight
    assert rows.to_local().shape[0] * 4 == rows.shape[0]
    found = results(model.train())
    whole = HAMForCausalLM.from_pretrained(path, dtype=torch.float64)
    results(whole.train())
    for (name, weight), (same, other) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert name == same
        pairs = [(weight.detach(), other.detach()), (weight.grad, other.grad)]
        for one, wanted in pairs:
            one = one.full_tensor() if isinstance(one, DTensor) else one
            torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-10)
    model.save_pretrained(path.with_name("again"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_is_that_of_one_process(workers, tmp_path, tied):
    torch.manual_seed(0)
    model = HAMForCausalLM(config(tie_word_embeddings=tied)).double()
    model.save_pretrained(tmp_path / "model")
    wanted = results(model.train())
    for found in workers.run(loaded, 4, tmp_path / "model"):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    again = HAMForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)
