"""The layer, the state and the model of release 0.1 whose files are kept in tests/data/0.1.

Every later release loads these files. `python tests/saved_0_1.py` wrote them; it is run again only
before 0.1 is released, if a change before the release alters what is saved.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import hamblocks as hb

FOLDER = Path(__file__).parent / "data" / "0.1"
PROMPT, TOKENS, SEQUENCES = 15, 20, 2


def layer_0_1() -> hb.HAMLayer:
    """A layer whose state has all that a state can have: convolutions, a ledger, biases, a ring."""
    layer = hb.HAMLayer(
        16,
        4,
        num_kv_heads=2,
        gate=hb.LearnedRouter(),
        selector=(hb.TopK(4) & hb.Threshold(-0.1)) | hb.Window(2),
        attention=hb.SelectedAttention(conv_size=2),
    )
    return layer.double().eval()


def config_0_1() -> hb.models.HAMConfig:
    """A model with a layer of each kind."""
    return hb.models.HAMConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_types=["linear_attention", "hybrid", "full_attention"],
        selector=hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(3),
        attention=hb.SelectedAttention(conv_size=1),
    )


def inputs_0_1() -> tuple[Tensor, Tensor]:
    """x of the layer, `[N, T, 16]`, and tokens of the model, `[N, T]`, without random numbers."""
    x = torch.linspace(0, 60, SEQUENCES * TOKENS * 16, dtype=torch.float64).sin()
    tokens = torch.arange(SEQUENCES * TOKENS) * 7 % 23
    return x.view(SEQUENCES, TOKENS, 16), tokens.view(SEQUENCES, TOKENS)


@torch.no_grad()
def save() -> None:
    """Writes the files."""
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    layer, (x, tokens) = layer_0_1(), inputs_0_1()
    for weight in layer.parameters():
        weight += 0.2 * torch.randn_like(weight)
    state = layer.init_state(SEQUENCES, page_size=4, rollback=2)
    state = layer.prefill(x[:, :PROMPT], state).state
    torch.save(state.state_dict(), FOLDER / "state.pt")
    torch.save(layer.state_dict(), FOLDER / "layer.pt")

    model = hb.models.HAMForCausalLM(config_0_1()).double()
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)
    model.train()(tokens)  # the first batch sets the threshold
    hb.step_controllers(model)
    model.eval().save_pretrained(FOLDER / "model")
    expected = {"y": layer.prefill(x[:, PROMPT:], state).y, "logits": model(tokens).logits}
    torch.save(expected, FOLDER / "expected.pt")


if __name__ == "__main__":
    save()
