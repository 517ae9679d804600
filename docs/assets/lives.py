"""Draws lives.png: one sequence of scores, and how long each policy of docs/policies.md stores what.

python docs/assets/lives.py
"""

from pathlib import Path

import torch
from torch import Tensor

from hamblocks import (
    Budget,
    Cooldown,
    ErrorMass,
    FirstTokens,
    PromptFraction,
    SublinearGrowth,
    Threshold,
    TopK,
    Window,
)
from hamblocks.plot import plot_lives
from hamblocks.protocols import Selector

TOKENS, PROMPT, MARKED = 48, 24, 22


def scores() -> Tensor:
    """A text that the memory predicts, but for four bursts: float32 `[T]`."""
    generator = torch.Generator().manual_seed(0)
    score = 0.3 * torch.rand(TOKENS, generator=generator)
    for burst in (slice(5, 8), slice(19, 23), slice(32, 34), slice(41, 44)):
        score[burst] += 0.6
    return score


def policies() -> dict[str, Selector | tuple[Selector, Tensor]]:
    """Selectors by the name of the policy; with scores, where it decides from others."""
    random = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    asked_for = torch.zeros(TOKENS).index_fill(0, torch.tensor([6, 22, 33]), 1)
    every_fourth = (torch.arange(TOKENS) % 4 == 0).float()
    return {
        "everything": Threshold(-torch.inf),
        "HAM": Threshold(0.6),
        "HAM with a window": Threshold(0.6) | Window(8),
        "HOLA": TopK(6),
        "LoLA": TopK(4, delay=6),
        "StreamingLLM": FirstTokens(2) | Window(8),
        "fraction of the prompt": PromptFraction(0.25, PROMPT) & (FirstTokens(PROMPT) | Window(8)),
        "error mass": ErrorMass(0.4, capacity=TOKENS),
        "sublinear growth": SublinearGrowth(0.5),
        "cooldown": Cooldown(Threshold(0.6), 4),
        "budget": Budget(Threshold(0.6), 5),
        "random": (Threshold(0.75), random),
        "every fourth": (Threshold(0.5), every_fourth),
        "oracle": (Threshold(0.5), asked_for),
    }


def lives() -> dict[str, Tensor]:
    """Lifetimes by the name of the policy, int32 `[T]` each."""
    score, found = scores(), {}
    for name, policy in policies().items():
        selector, given = policy if isinstance(policy, tuple) else (policy, score)
        found[name] = selector(given[None, :, None]).evict_at[0, :, 0]
    return found


if __name__ == "__main__":
    figure = plot_lives(lives(), score=scores(), mark=MARKED)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)
