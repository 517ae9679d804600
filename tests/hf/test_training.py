"""Training: activation checkpointing, and transformers' Trainer, which moves the thresholds."""

import logging

import pytest
import torch
import transformers
from hf_cases import VOCAB, buffers, config, model, text
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import hamblocks as hb
from hamblocks.models import ControllerCallback, HAMCache, HAMForCausalLM


def target(fraction=0.3):
    return hb.Threshold(hb.TargetFraction(fraction)) | hb.Window(2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    made, ids = model(selector=target()).train(), text(2, 2, 12)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable(made, reentrant)
            assert made.model.is_checkpointing
        made.zero_grad()
        made(ids, labels=ids).loss.backward()
        gradients.append([weight.grad.clone() for weight in made.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def enable(made, reentrant=False):
    name = "activation_checkpointing_enable"
    if hasattr(made, name):
        made.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    else:
        made.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )


def test_checkpointing_and_the_cache(caplog):
    made, ids = model().train(), text(2, 1, 5)
    enable(made)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert made(ids, use_cache=True).past_key_values is None
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity_error()
    assert [record.message for record in caplog.records].count(
        "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
    ) == 1
    with pytest.raises(
        ValueError, match=r"^past_key_values: expected None under gradient checkpointing"
    ):
        made(ids, past_key_values=HAMCache())
    assert made.eval()(ids, use_cache=True).past_key_values is not None


def run(tmp_path, made, *, steps=6, accumulation=1, data=None, callbacks=True, **more):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
        **more,
    )
    data = data or [{"input_ids": row, "labels": row} for row in text(5, 8, 16)]
    extra = {"data_collator": DataCollatorWithFlattening()} if "lengths" in data[0] else {}
    trainer = Trainer(
        made,
        arguments,
        train_dataset=data,
        callbacks=[ControllerCallback()] if callbacks else None,
        **extra,
    )
    return trainer, trainer.train()


def controllers(made):
    return [module for module in made.modules() if isinstance(module, hb.TargetFraction)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_moves_the_thresholds_once_per_update(tmp_path, accumulation):
    torch.manual_seed(0)
    made = HAMForCausalLM(config(selector=target(), layer_types=["hybrid"] * 3))
    calls = []
    first = controllers(made)[0]
    step = first.step
    first.step = lambda: (calls.append(int(first.seen)), step())
    ids = text(5, 2, 16)
    before = made(ids, labels=ids).loss.item()
    first.reset()
    run(tmp_path, made, accumulation=accumulation)
    # two heads score each of the 2 * 16 tokens of every micro-batch
    assert calls == [2 * 2 * 16 * accumulation] * 6
    assert all(bool(controller.started) for controller in controllers(made))
    assert made(ids, labels=ids).loss.item() < before


def test_without_the_callback_nothing_moves(tmp_path):
    made = HAMForCausalLM(config(selector=target()))
    run(tmp_path, made, steps=2, callbacks=False)
    assert not any(bool(controller.started) for controller in controllers(made))


def test_trainer_with_packed_batches_checkpointing_and_bfloat16(tmp_path):
    made = HAMForCausalLM(config(selector=target()))
    data = [{"input_ids": text(n, 3 + n).tolist(), "lengths": 0} for n in range(8)]
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    trainer, result = run(tmp_path, made, data=data, bf16=True, **{name: True})
    assert result.training_loss < 1.5 * torch.tensor(VOCAB).log()
    assert all(bool(controller.started) for controller in controllers(made))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = HAMForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(buffers(loaded)[name], x)
        for name, x in buffers(made).items()
        if name.endswith("tau_sum")
    )


def test_evaluation_of_the_trainer(tmp_path):
    made = HAMForCausalLM(config(selector=target()))
    data = [{"input_ids": row, "labels": row} for row in text(5, 4, 16)]
    trainer, _ = run(tmp_path, made, steps=1, data=data)
    before = {name: x.clone() for name, x in buffers(made).items()}
    logits = trainer.predict(data).predictions
    assert logits.shape == (4, 16, VOCAB)
    assert all(
        torch.equal(x.nan_to_num(), before[name].nan_to_num()) for name, x in buffers(made).items()
    )


def test_keep_fraction_of_a_trained_model(tmp_path):
    torch.manual_seed(0)
    made = HAMForCausalLM(
        config(selector=hb.Threshold(hb.TargetFraction(0.3)), layer_types=["hybrid"] * 3)
    )
    run(tmp_path, made, steps=3)
    made.save_pretrained(tmp_path / "trained")
    loaded, ids = HAMForCausalLM.from_pretrained(tmp_path / "trained"), text(9, 2, 40)
    stored, bytes_used = [], []
    for fraction in (0.0, 0.1, 0.5, 1.0):
        loaded.set_keep_fraction(fraction)
        out = loaded.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache = out.past_key_values
        stored.append(
            sum(int(tokens.sum()) for tokens in cache.tokens) / (3 * 2 * 2 * cache.get_seq_length())
        )
        bytes_used.append(cache.nbytes)
    assert stored == sorted(stored)
    assert (stored[0], stored[-1]) == (0, 1)
    assert 0 < stored[1] < stored[2] < 1
    assert bytes_used[0] < bytes_used[-1]
    assert loaded.model.stack.layers[0].selector.controller.fraction == 0.3
    with pytest.raises(ValueError, match=r"^fraction: expected a number in \[0, 1\], got 2"):
        loaded.set_keep_fraction(2)
    with pytest.raises(ValueError, match=r"^fraction: expected a model with a TargetFraction"):
        model(selector=hb.Window(2)).set_keep_fraction(0.5)
    unseen = HAMForCausalLM(config(selector=target()))
    unseen.set_keep_fraction(0.5)
    assert all((one.fraction, one.tau) == (0.5, -torch.inf) for one in controllers(unseen))
