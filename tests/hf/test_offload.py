"""Weights that are elsewhere: offloaded to memory or disk, or on the meta device."""

import copy

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from hf_cases import SELECTORS, config, model, padded, rows, text
from transformers import AutoModelForCausalLM

import hamblocks as hb
from hamblocks.models import HAMForCausalLM

IDS, MASK = padded(rows(1, [3, 9, 1, 6]))
PARTS = {
    **{name: {"selector": selector} for name, selector in SELECTORS.items()},
    "untied": {"selector": lambda: hb.TopK(3), "tie_word_embeddings": False},
    "entropy": {
        "selector": lambda: hb.TopK(3),
        "gate": {"type": "prediction_entropy", "vocab_size": 19},
    },
    "delta": {"selector": lambda: hb.TopK(3), "memory": {"type": "delta_memory"}},
    "convolved": {
        "selector": lambda: hb.TopK(3),
        "attention": {"type": "selected_attention", "conv_size": 3, "null_sink": True},
    },
    "router": {"selector": lambda: hb.TopK(3), "gate": {"type": "learned_router"}},
    "mix": {"selector": lambda: hb.TopK(3), "combiner": {"type": "softmax_mix"}},
}
ON_DISK = {
    "layers": ["model.stack.blocks.0", "model.stack.blocks.1"],
    "head": ["model.stack.blocks.2", "lm_head"],
    "embedding": ["model.embed_tokens", "model.stack.blocks.1"],
}


def device_map(on_disk):
    names = ["model.embed_tokens", "model.stack.norm", "lm_head"]
    names += [f"model.stack.blocks.{index}" for index in range(3)]
    return {name: "disk" if name in ON_DISK[on_disk] else "cpu" for name in names}


def made_of(name):
    made = PARTS[name]
    return model(dtype=torch.float32, **{**made, "selector": made["selector"]()})


@torch.no_grad()
def check(offloaded, made):
    """Forward with and without the default cache, and generate(), are those of `made`."""
    for use_cache in (None, False):
        how = {"attention_mask": MASK, "use_cache": use_cache}
        assert torch.equal(offloaded(IDS, **how).logits, made(IDS, **how).logits)
    how = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(offloaded.generate(IDS, **how), made.generate(IDS, **how))


def weights_elsewhere(made):
    return [name for name, weight in made.named_parameters() if weight.is_meta]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "buffers"), [*((name, True) for name in PARTS), ("target", False), ("router", False)]
)
def test_weights_that_come_for_each_module(name, buffers):
    made = made_of(name)
    offloaded = cpu_offload(copy.deepcopy(made), execution_device="cpu", offload_buffers=buffers)
    assert weights_elsewhere(offloaded) == [name for name, _ in offloaded.named_parameters()]
    check(offloaded, made)


# transformers asks for enough memory when it saves
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        *((name, "layers") for name in PARTS),
        *(("untied", on_disk) for on_disk in ("head", "embedding")),
    ],
)
def test_a_device_map_with_a_disk(tmp_path, name, on_disk):
    made = made_of(name)
    made.save_pretrained(tmp_path / "saved")
    how = {"device_map": device_map(on_disk), "offload_folder": tmp_path / "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **how)
    assert weights_elsewhere(loaded)
    check(loaded, made)
    loaded.save_pretrained(tmp_path / "again")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), made)


@pytest.mark.parametrize("name", ["target", "entropy"])
def test_a_map_that_accelerate_makes_splits_no_layer(tmp_path, name):
    made = made_of(name)
    made.save_pretrained(tmp_path / "saved")
    size = sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": int(0.8 * size)},
        offload_folder=tmp_path / "disk",
    )
    places = loaded.hf_device_map
    assert {"cpu", "disk"} <= set(places.values())
    assert {f"model.stack.blocks.{index}" for index in range(3)} <= places.keys()
    check(loaded, made)


def test_the_keep_fraction_of_an_offloaded_model():
    made = made_of("target")
    inside = cpu_offload(copy.deepcopy(made), execution_device="cpu")
    inside.set_keep_fraction(0.1)
    changed = copy.deepcopy(made)
    changed.set_keep_fraction(0.1)
    check(inside, changed)
    outside = cpu_offload(copy.deepcopy(made), execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match=r"^fraction: expected a model with its buffers in memory"):
        outside.set_keep_fraction(0.1)


def test_sizes_on_the_meta_device():
    made = config(selector=hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(2))
    with init_empty_weights():
        empty = HAMForCausalLM(made)
    total, (largest, _) = calculate_maximum_sizes(empty)
    assert total > largest > 0
    with torch.device("meta"):
        ids, mask = text(0, 2, 9).to("meta"), torch.ones(2, 9)
        shapes = HAMForCausalLM(made)
    for mode in (shapes.train(), shapes.eval()):
        for arguments in ({}, {"attention_mask": mask}, {"position_ids": torch.ones(2, 9).long()}):
            out = mode(ids, labels=ids, **{k: v.to("meta") for k, v in arguments.items()})
            assert out.logits.shape == (2, 9, 19)
            assert out.logits.is_meta
            assert out.loss.shape == ()
            assert out.past_key_values is None
    with pytest.raises(ValueError, match="on meta"):
        shapes(ids, use_cache=True)
