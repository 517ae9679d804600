"""Models between the tools of transformers, peft, safetensors and torch.distributed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from hf.hf_cases import VOCAB, model, text
from torch import nn

import hamblocks as hb
from hamblocks.models import HAMCache, HAMForCausalLM
from hamblocks.stack import entropy_gates

IDS = text(3, 2, 9)
GREEDY = {"max_new_tokens": 4, "do_sample": False}
ENTROPY = {"gate": hb.PredictionEntropy(VOCAB)}


def made(**changes):
    selector = hb.Threshold(hb.TargetFraction(0.3)) | hb.Window(2)
    return model(
        selector=selector,
        dtype=torch.float32,
        layer_types=["hybrid"] * 2,
        num_hidden_layers=2,
        **changes,
    )


def test_labels_that_all_do_not_count_give_no_nan():
    one = made().train()
    for ids, labels in (
        (IDS, torch.full_like(IDS, -100)),
        (IDS[:, :1], IDS[:, :1]),
        (IDS[:0], IDS[:0]),
    ):
        for count in (None, 0, torch.tensor(0)):  # the Trainer counts the labels of all batches
            loss = one(ids, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            assert loss == 0
    assert all(w.grad is None or bool((w.grad == 0).all()) for w in one.parameters())
    logits = one(IDS).logits[:, :-1].flatten(0, 1)
    want = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    torch.testing.assert_close(one(IDS, labels=IDS).loss, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_narrow_types(dtype):
    one = made()
    ids, mask = IDS.to(dtype), torch.ones_like(IDS)
    assert one(ids, labels=ids).loss == one(IDS, labels=IDS).loss
    want = one(IDS).logits
    assert torch.equal(one(ids, logits_to_keep=np.int64(2)).logits, want[:, -2:])
    assert torch.equal(one(ids, position_ids=torch.arange(9, dtype=dtype)[None]).logits, want)
    for kind in (torch.bool, torch.int8, torch.float32, torch.bfloat16):
        assert torch.equal(one(ids, attention_mask=mask.to(kind)).logits, want)
    cache = HAMCache(page_size=np.int64(8), max_pages=np.int32(99))
    one(ids, past_key_values=cache)
    cache.checkpoint()
    one(ids[:, :1], past_key_values=cache)
    cache.crop(np.int64(-1))
    cache.batch_repeat_interleave(np.int64(2))
    assert (cache.get_seq_length(), cache.batch_size) == (9, 4)


def test_a_cache_between_processes():
    one, cache = made(), HAMCache()
    one(IDS, past_key_values=cache)
    other = pickle.loads(pickle.dumps(cache))
    want = one(IDS[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(one(IDS[:, :1], past_key_values=other).logits, want)
    assert other.get_seq_length() == 10


@pytest.mark.parametrize(
    "gate",
    [
        lambda: hb.PredictionEntropy(VOCAB),
        lambda: hb.WeightedSum([hb.PredictionEntropy(VOCAB), hb.PredictionError()], [1.0, 0.5]),
    ],
)
def test_a_vocabulary_that_grows_is_saved_in_the_gates_too(tmp_path, gate):
    one = made(gate=gate())
    one.resize_token_embeddings(VOCAB + 5)
    one.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    ids = IDS + 5
    assert torch.equal(loaded(ids).logits, one(ids).logits)
    assert {gate.vocab_size for gate in entropy_gates(loaded).values()} == {VOCAB + 5}


def test_a_head_that_is_replaced_is_that_of_the_gates():
    one = made(**ENTROPY, tie_word_embeddings=False)
    head = nn.Linear(16, VOCAB + 2, bias=False)
    one.set_output_embeddings(head)
    assert all(gate.head.weight is head.weight for gate in entropy_gates(one).values())
    assert one(IDS).logits.shape[-1] == VOCAB + 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_all_linear_layers_leave_the_head_that_gates_share(tmp_path):
    peft = pytest.importorskip("peft")
    one = made(**ENTROPY)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(one, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert not any(".head." in name for name, _ in adapted.named_parameters() if "lora" in name)
    head = one.lm_head.weight.clone()
    want = adapted(input_ids=IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.lm_head.weight, head)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_embedding_that_is_wrapped():
    peft = pytest.importorskip("peft")
    lora = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(trainable_token_indices=[1, 2], **lora)
    adapted = peft.get_peft_model(made(), config)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match=r"^input_ids: expected values in"):
        adapted(input_ids=IDS + VOCAB)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prefixes_of_keys_and_values_are_refused_by_name():
    peft = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(made(), prefix)
    with pytest.raises(
        ValueError, match=r"^past_key_values: expected a HAMCache, got DynamicCache"
    ):
        adapted(input_ids=IDS, labels=IDS)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_generation_under_activation_checkpointing_is_right_or_refused():
    one = made()
    want = one.generate(IDS, **GREEDY)
    enable = getattr(one, "activation_checkpointing_enable", one.gradient_checkpointing_enable)
    enable()
    assert torch.equal(one.generate(IDS, **GREEDY), want)
    one.train()
    message = r"^past_key_values: expected None under gradient checkpointing \(generate in eval"
    with pytest.raises(ValueError, match=message):
        one.generate(IDS, **GREEDY)


def test_a_mask_of_four_dimensions_and_foreign_caches_are_refused_by_name():
    one = made()
    with pytest.raises(ValueError, match=r"^attention_mask: expected a tensor \[B, past \+ T\]"):
        one(IDS, attention_mask=torch.ones(2, 1, 9, 9))
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=r"^cache_implementation: expected None"):
            one.generate(IDS, cache_implementation=kind, **GREEDY)


def checkpointed_layers(one):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(one, check_fn=lambda module: isinstance(module, hb.HAMLayer))


def test_layers_in_wrappers():
    one = made()
    want, logits = one.generate(IDS, **GREEDY), one(IDS).logits
    checkpointed_layers(one)
    assert torch.equal(one.generate(IDS, **GREEDY), want)
    assert torch.equal(one(IDS).logits, logits)
    one.set_keep_fraction(0.5)
    taus = [m.tau.item() for m in one.modules() if isinstance(m, hb.TargetFraction)]
    one.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    hb.step_controllers(one)
    assert taus != [m.tau.item() for m in one.modules() if isinstance(m, hb.TargetFraction)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_shared_weights_and_buffers_survive_other_file_formats(tmp_path):
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_model, save_model

    one, other, third = (made(seed=seed, **ENTROPY) for seed in range(3))
    want = one(IDS).logits
    save_model(one, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(IDS).logits, want)
    dcp.save({"model": one.state_dict()}, checkpoint_id=tmp_path / "dcp")
    state = {"model": third.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    third.load_state_dict(state["model"])
    assert torch.equal(third(IDS).logits, want)


def test_guidance_runs_two_caches():
    one = made()
    guided = {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:, :4], **GREEDY}
    got = one.generate(IDS, **guided)
    assert torch.equal(got, one.generate(IDS, use_cache=False, **guided))
    assert not torch.equal(got, one.generate(IDS, **GREEDY))


def test_an_interrupt_between_two_layers_leaves_the_cache():
    one, cache = made(), HAMCache()
    one(IDS, past_key_values=cache)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = one.model.stack.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        one(IDS[:, :1], past_key_values=cache)
    handle.remove()
    got = one(IDS[:, :1], past_key_values=cache).logits[:, -1]
    want = one(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
