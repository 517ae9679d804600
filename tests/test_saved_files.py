"""Files of earlier releases load, and give what they gave."""

from __future__ import annotations

import json

import pytest
import torch
from saved_0_1 import FOLDER, PROMPT, SEQUENCES, inputs_0_1, layer_0_1

from hamblocks.state import FORMAT


def load(name):
    return torch.load(FOLDER / name, weights_only=True)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def loaded_layer():
    layer = layer_0_1()
    layer.load_state_dict(load("layer.pt"))
    return layer


@torch.no_grad()
def test_a_state_of_0_1_goes_on():
    layer, (x, _), expected = loaded_layer(), inputs_0_1(), load("expected.pt")
    saved = load("state.pt")
    assert saved["format"] == 1
    state = layer.load_state(saved)
    assert state.position.tolist() == [PROMPT] * SEQUENCES
    y, state, _ = layer.prefill(x[:, PROMPT:], state)
    close(y, expected["y"])
    assert y.std() > 0.01
    # it can take tokens back, as the state that was saved could
    y, state, _ = layer.prefill(x[:, -2:], state.rollback(2))
    close(y, expected["y"][:, -2:])
    # it was saved in the middle of a sequence, and one pass gives the same
    close(layer(x).y[:, PROMPT:], expected["y"])


@torch.no_grad()
def test_a_model_of_0_1_gives_what_it_gave():
    models = pytest.importorskip("hamblocks.models")
    model = models.HAMForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float64).eval()
    # a saved policy states every argument, so a default that changes later does not change it
    assert model.config.attention["conv_size"] == 1
    _, tokens = inputs_0_1()
    close(model(tokens).logits, load("expected.pt")["logits"])
    assert "format" not in json.loads((FOLDER / "model" / "config.json").read_text())


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (None, r"^format: expected 1 in a saved configuration, got None: it is no saved"),
        (0, r"^format: expected 1 in a saved configuration, got 0: it is no saved configuration"),
        (7, r"^format: expected 1 .* got 7: a newer release of hamblocks saved it"),
    ],
)
def test_a_model_of_an_unknown_format_is_refused(tmp_path, number, message):
    models = pytest.importorskip("hamblocks.models")
    transformers = pytest.importorskip("transformers")
    models.HAMConfig(vocab_size=23, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["format"] == 1
    # what else a newer file holds does not matter
    file.write_text(json.dumps({**saved, "format": number, "memory": {"type": "of_the_future"}}))
    with pytest.raises(ValueError, match=message):
        transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.HAMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (None, r"^format: expected 1 in a saved state, got None: it is no saved state"),
        (0, r"^format: expected 1 in a saved state, got 0: it is no saved state"),
        ("1", r"^format: expected 1 in a saved state, got 1: it is no saved state"),
        (True, r"^format: expected 1 in a saved state, got True: it is no saved state"),
        (FORMAT + 1, r"^format: expected 1 .* got 2: a newer release of hamblocks saved it"),
    ],
)
def test_a_state_of_an_unknown_format_is_refused(number, message):
    layer, saved = loaded_layer(), load("state.pt")
    del saved["format"]
    if number is not None:
        saved["format"] = number
    with pytest.raises(ValueError, match=message):
        layer.load_state(saved)
