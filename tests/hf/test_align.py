"""Alignment: errors of every layer fall, nothing of the source changes, a run goes on where it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hf_cases import VOCAB, text
from source_cases import SOURCES, InFloat64, logits, source
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.models import HAMForCausalLM, convert
from hamblocks.models.alignment import (
    STATE,
    align,
    start_from_teacher,
)
from hamblocks.models.distillation import distill
from hamblocks.models.students import OLD, AlignmentSettings
from hamblocks.models.teacher import full_attention, half_life, key_moments, source_logits
from hamblocks.retrofit_cli import REPORT

SETTINGS = AlignmentSettings(
    steps=12,
    tokens=48,
    fractions=(0.0, 0.25),
    lr=0.05,
    held_out=1,
    workers=1,
    save_every=5,
)


def selector() -> hb.AnyOf:
    return hb.Threshold(hb.TargetFraction(0.25)) | hb.Window(4)


def converted(name: str = "llama", dtype: torch.dtype = torch.float32, **given) -> HAMForCausalLM:
    torch.manual_seed(3)
    return convert(source(name, dtype), **{"selector": selector(), **given})


def ids(seed: int = 0, length: int = 600) -> torch.Tensor:
    """A text that repeats itself: what stood once stands again, out of the window."""
    piece = text(seed, 40)
    return piece.repeat(length // 40 + 1)[:length]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_the_teacher_is_the_source(name):
    old = source(name)
    model = convert(old, selector=hb.Window(2))
    tokens = text(1, 2, 40)
    with InFloat64():
        hidden = old(tokens, output_hidden_states=True).hidden_states
    seen = list(full_attention(model, tokens))
    assert [taught.layer for taught in seen] == [0, 1, 2]
    for (index, x, y, ahead), layer in zip(seen, old.model.layers, strict=True):
        with InFloat64():
            expected = layer.input_layernorm(hidden[index])
        assert y.shape == x.shape
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
        if index < 2:
            torch.testing.assert_close(ahead, hidden[index + 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        source_logits(model, tokens), logits(old, tokens), rtol=1e-9, atol=1e-9
    )


def test_layers_that_had_a_memory_are_not_aligned():
    model = converted("qwen3_next")
    before = weights(model)
    result = align(model, ids(), replace(SETTINGS, steps=4))
    assert result.layers == [1]
    for name, weight in model.state_dict().items():
        within = name.partition(".layer.")[2]
        if ".blocks.1." not in name or not within or within.startswith(OLD):
            assert torch.equal(weight, before[name]), name
    for layers in ([0], [0, 2]):
        with pytest.raises(ValueError, match=r"^model: expected a hybrid layer that was attention"):
            align(converted("qwen3_next", layers=layers), ids(), SETTINGS)


@torch.no_grad()
def test_half_life_of_heads_with_a_known_reach():
    """Equal weights from distance 50 on: the density is ln 2 up to 100, and half of it 97 away."""
    model = convert(source("smollm3"), selector=hb.Window(2))
    layer = model.model.stack.layers[1]  # without rotary positions
    x = torch.randn(1, 200, 32, dtype=torch.float64)
    layer.q_proj.weight.zero_()
    assert torch.all((half_life(layer, x) - 97).abs() < 5)
    assert layer.attention.rope_theta is None


@torch.no_grad()
def test_a_start_from_the_teacher_whitens_keys_and_sets_the_decay():
    model = converted("qwen2", torch.float64)
    layer = model.model.stack.layers[1]
    x = torch.randn(1, 400, 32, dtype=torch.float64) + 2
    lives = half_life(layer, x)
    start_from_teacher(layer, x)
    memory = layer.memory
    g = memory.decay(torch.zeros(1, 1, 32, dtype=torch.float64))[0, 0]
    torch.testing.assert_close(math.log(2) / -g, lives, rtol=1e-4, atol=0)
    keys = memory.k_proj(x).unflatten(-1, (4, 8))[0]
    moment = torch.einsum("thd,the->hde", keys, keys) / len(keys)
    own = key_moments(layer, x)[0].diagonal().mean()
    assert own > 2
    apart = moment - torch.eye(8, dtype=torch.float64)
    assert float(apart.diagonal(dim1=-2, dim2=-1).abs().max()) <= 1
    assert float((apart - torch.diag_embed(apart.diagonal(dim1=-2, dim2=-1))).abs().max()) < 0.5


def test_errors_fall_and_the_source_stays():
    model = converted()
    before = weights(model)
    result = align(model, ids(), SETTINGS)
    for fraction in ("0", "0.25"):
        assert sum(result.after[fraction]) < 0.9 * sum(result.before[fraction]), result
    assert result.layers == [0, 1, 2]
    for name, weight in model.state_dict().items():
        within = name.partition(".layer.")[2]
        if not within or within.startswith(OLD):
            assert torch.equal(weight, before[name]), name
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert {name.partition(".layer.")[2].split(".")[0] for name in moved} == {
        "memory",
        "combiner",
        "selector",
    }
    assert all(weight.requires_grad for weight in model.parameters())
    assert not model.training
    for layer in model.model.stack.layers:
        controller = layer.selector.left.controller
        assert controller.fraction == 0.25
    stats = model(ids()[None, :200], use_cache=False).stats
    fractions = [float(x.keep_fraction()) for x in stats]
    assert all(0.1 < fraction < 0.5 for fraction in fractions), fractions


@pytest.mark.slow
def test_distillation_brings_predictions_nearer_and_the_source_stays(tmp_path):
    model = converted()
    before = weights(model)
    settings = replace(SETTINGS, lr=0.02)
    result = distill(model, ids(), settings, folder=tmp_path)
    for fraction in ("0", "0.25"):
        assert sum(result.after[fraction]) < 0.95 * sum(result.before[fraction]), result
    for name, weight in model.state_dict().items():
        within = name.partition(".layer.")[2]
        if not within or within.startswith(OLD):
            assert torch.equal(weight, before[name]), name
    assert torch.load(tmp_path / "distillation.pt")["done"] == 10
    again = distill(converted(), ids(), settings, folder=tmp_path)
    torch.testing.assert_close(again.after["0"], result.after["0"], rtol=1e-4, atol=1e-6)
    everything = converted(selector=hb.Threshold(-math.inf))
    exact = distill(everything, ids(), replace(settings, steps=0))
    assert max(map(abs, exact.before["0.25"])) < 1e-5
    with pytest.raises(ValueError, match=r"^model: expected a HAMForCausalLM"):
        distill(model.model, ids(), settings)


def test_layers_that_stay_full_attention_are_left_alone():
    model = converted(layers=[1])
    before = weights(model)
    result = align(model, ids(), replace(SETTINGS, steps=2))
    assert result.layers == [1]
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert {name.split(".")[3] for name in moved} == {"1"}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    few = replace(SETTINGS, steps=3)
    one, two, other = converted(), converted(), converted()
    align(one, ids(), few)
    align(two, ids(), replace(few, workers=2))
    align(other, ids(), replace(few, seed=1))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, two.state_dict()[name])
    assert any(
        not torch.allclose(weight, other.state_dict()[name])
        for name, weight in one.state_dict().items()
    )


@pytest.mark.slow
def test_a_run_that_stops_goes_on(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(name, done, total, remark):
        if done == 8:
            raise StoppedError

    whole, halves = converted(), converted()
    expected = align(whole, ids(), SETTINGS, folder=tmp_path / "whole")
    with pytest.raises(StoppedError):
        align(halves, ids(), SETTINGS, folder=tmp_path / "halves", progress=stop)
    assert (tmp_path / "halves" / STATE).exists()
    again, seen = converted(), []
    result = align(
        again,
        ids(),
        SETTINGS,
        folder=tmp_path / "halves",
        progress=lambda _, done, total, __: seen.append((done, total)),
    )
    assert seen[0] == (6, 12)
    assert result.before == expected.before
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight)
    with pytest.raises(ValueError, match=r"^folder: expected settings"):
        align(converted(), ids(), replace(SETTINGS, seed=5), folder=tmp_path / "halves")
    with pytest.raises(ValueError, match=r"^folder: expected tokens 600"):
        align(converted(), ids(length=601), SETTINGS, folder=tmp_path / "halves")
    with pytest.raises(ValueError, match=r"^folder: expected layers"):
        align(converted(layers=[0]), ids(), SETTINGS, folder=tmp_path / "halves")
    other = converted()
    with torch.no_grad():
        other.model.stack.layers[1].q_proj.weight[0, 0] += 1
    for model in (other, converted(gate=hb.KeyNorm())):
        with pytest.raises(ValueError, match=r"^folder: expected model"):
            align(model, ids(), SETTINGS, folder=tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"memory": hb.DeltaMemory()},
        {"memory": hb.GatedDeltaMemory(projections="own", num_heads=2, head_dim=6)},
        {"gate": hb.LearnedRouter()},
        {"selector": hb.TopK(5) | hb.Window(2)},
    ],
)
def test_other_parts_are_aligned_too(changes):
    model = converted("qwen3", **changes)
    result = align(model, ids(), replace(SETTINGS, fractions=(0.0,)))
    assert sum(result.after["0"]) < 0.97 * sum(result.before["0"]), result


def test_bad_arguments_are_named():
    model = converted()
    with pytest.raises(ValueError, match=r"^ids: expected 96 tokens or more"):
        align(model, ids(length=95), SETTINGS)
    with pytest.raises(ValueError, match=r"^model: expected a HAM model"):
        align(source("llama", torch.float32), ids(), SETTINGS)
    made = HAMForCausalLM(converted().config.__class__(vocab_size=VOCAB, hidden_size=32))
    with pytest.raises(ValueError, match=r"^model: expected attention and a ScaledSum"):
        align(made, ids(), SETTINGS)
    shared = converted()
    controller = hb.TargetFraction(0.5)
    for layer in shared.model.stack.layers:
        layer.selector = hb.Threshold(controller)
    with pytest.raises(ValueError, match=r"^model: expected layers that share no part"):
        align(shared, ids(), SETTINGS)
    for name, value in (("steps", -1), ("lr", 0.0), ("fractions", (2.0,)), ("workers", 0)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            replace(SETTINGS, **{name: value})


def test_the_command(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(97 + n): n for n in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    model = converted()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "text.txt"
    file.write_text(" ".join(chr(97 + int(n)) for n in ids(length=400)))
    arguments = ["align", tmp_path / "model", tmp_path / "out", "--text", file, "--steps", 6]
    arguments += ["--tokens", 48, "--fractions", "0,0.25", "--workers", 1, "--distill", 2]
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["settings"]["steps"] == 6
    assert set(report["alignment"]["after"]) == {"0", "0.25"}
    assert len(report["distillation"]["after"]["0.25"]) == 4
    assert not list((tmp_path / "out").glob("*.pt"))
    loaded = HAMForCausalLM.from_pretrained(tmp_path / "out")
    changed = loaded.model.stack.layers[0].combiner.gate_proj.weight
    assert not torch.equal(changed, model.model.stack.layers[0].combiner.gate_proj.weight)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    bad = CliRunner().invoke(app, [*map(str, arguments), "--fractions", "a"])
    assert bad.exit_code == 2
    # without steps of alignment, an aligned model is distilled as it is
    arguments[1:3] = [tmp_path / "out", tmp_path / "distilled"]
    more = [*map(str, arguments), "--steps", "0"]
    result = CliRunner().invoke(app, [*more, "--distill", "1"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    further = json.loads((tmp_path / "distilled" / REPORT).read_text())
    assert "alignment" not in further
    for fraction, after in report["distillation"]["after"].items():
        # the state before the first step is that after the last one of the run before
        assert further["distillation"]["before"][fraction] == pytest.approx(after, rel=0.05)
    nothing = CliRunner().invoke(app, [*more, "--distill", "0"])
    assert nothing.exit_code == 2
    assert "steps: expected 1 or more" in nothing.output
    # what is wrong is named, and before the work
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    source("llama", torch.float32).save_pretrained(tmp_path / "llama")
    for changed, named in (
        (["--text", tmp_path / "bad.txt"], "--text: expected a file in UTF-8"),
        (["--device", "nowhere"], "--device: expected a device that torch can use here"),
        ([], 'model_type: expected "ham" (hamblocks.models.convert makes such a model'),
    ):
        arguments[1] = tmp_path / ("model" if changed else "llama")
        bad = CliRunner().invoke(app, [*map(str, [*arguments, *changed])], env={"COLUMNS": "200"})
        assert bad.exit_code == 2
        assert named in " ".join(bad.output.replace("│", " ").split())
