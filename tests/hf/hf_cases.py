"""Tiny models for transformers, ragged prompts, and plain loops to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import logging

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB, PAD = 19, 0
MIXED = ["linear_attention", "hybrid", "full_attention"]
SELECTORS: dict[str, Any] = {
    "threshold": lambda: hb.Threshold(0.97),
    "top-k": lambda: hb.TopK(3),
    "window": lambda: hb.Window(4),
    "target": lambda: hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(2),
    "ranked": lambda: (hb.TopK(4) & hb.Threshold(0.9)) | hb.FirstTokens(1),
}


def config(**changes: Any) -> HAMConfig:
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    given = {
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "layer_types": MIXED,
        "initializer_range": 0.3,
        **sizes,
        **changes,
    }
    return HAMConfig(**given)


def model(
    seed: int = 0, dtype: torch.dtype = torch.float64, *, layer: Any = None, **changes: Any
) -> HAMForCausalLM:
    """A model in eval mode, with moved weights and with thresholds after two training steps.

    An initial value of a weight may hide a mistake, so every weight is moved by a random number.
    """
    torch.manual_seed(seed)
    made = HAMForCausalLM(config(**changes), layer=layer)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn_like(weight)
    made.train()
    for _ in range(2):
        made(text(seed, 2, 24))
        hb.step_controllers(made)
    return made.to(dtype).eval()


def text(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, lengths: Sequence[int]) -> list[Tensor]:
    return list(text(seed, sum(lengths)).split(list(lengths)))


def padded(prompts: Sequence[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Prompts padded to one batch, and its mask; `side` of the padding is left, right or both."""
    longest = max(len(prompt) for prompt in prompts) + (side == "both")
    ids, mask = (
        torch.full((len(prompts), longest), PAD),
        torch.zeros(len(prompts), longest, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        room = longest - len(prompt)
        begin = {"left": room, "right": 0, "both": room // 2}[side]
        ids[row, begin : begin + len(prompt)], mask[row, begin : begin + len(prompt)] = prompt, 1
    return ids, mask


@torch.no_grad()
def greedy(made: HAMForCausalLM, prompt: Tensor, steps: int) -> Tensor:
    """Continues one prompt greedily, with a full forward pass without a cache for every token."""
    for _ in range(steps):
        logits = made(prompt[None], use_cache=False).logits
        prompt = torch.cat([prompt, logits[0, -1:].argmax(-1)])
    return prompt


def buffers(made: torch.nn.Module) -> dict[str, Tensor]:
    return dict(made.named_buffers())


def bits(x: Tensor) -> Tensor:
    """Bits of a float tensor as integers, so that NaN equals NaN."""
    return (
        x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        if x.is_floating_point()
        else x
    )
