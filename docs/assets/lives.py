"""Draws one sequence of scores, and how long each policy of docs/policies stores what.

python docs/assets/lives.py draws lives.png, with all policies, and lives/NAME.png for every page.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
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
PAGES = {
    "ham": ["HAM", "HAM with a window"],
    "hola": ["HOLA"],
    "lola": ["LoLA"],
    "amor": ["AMOR"],
    "l2a": ["L2A"],
    "streamingllm": ["StreamingLLM"],
    "norms": ["norms"],
    "retrieval_heads": ["a retrieval head", "the other heads"],
    "prompt_fraction": ["fraction of the prompt"],
    "error_mass": ["error mass"],
    "sublinear_growth": ["sublinear growth"],
    "cooldown_budget": ["cooldown", "budget"],
    "controls": ["random", "every fourth"],
    "oracle": ["oracle"],
}
"""What the picture of each page of docs/policies shows."""
UNSCORED = ("AMOR", "L2A", "StreamingLLM", "a retrieval head")
"""Policies whose selectors read no score."""


def scores() -> Tensor:
    """A text that the memory predicts, but for four bursts: float32 `[T]`."""
    generator = torch.Generator().manual_seed(0)
    score = 0.3 * torch.rand(TOKENS, generator=generator)
    for burst in (slice(5, 8), slice(19, 23), slice(32, 34), slice(41, 44)):
        score[burst] += 0.6
    return score


def policies() -> dict[str, Selector | tuple[Selector, Tensor]]:
    """Selectors by the name of the policy; with scores, where it decides from others."""
    generator = torch.Generator().manual_seed(1)
    random, norms = torch.rand(2, TOKENS, generator=generator)
    asked_for = torch.zeros(TOKENS).index_fill(0, torch.tensor([6, 22, 33]), 1)
    every_fourth = (torch.arange(TOKENS) % 4 == 0).float()
    return {
        "everything": Threshold(-torch.inf),
        "HAM": Threshold(0.6),
        "HAM with a window": Threshold(0.6) | Window(8),
        "HOLA": TopK(6),
        "LoLA": TopK(4, delay=6),
        "AMOR": Threshold(-torch.inf),
        "L2A": Threshold(-torch.inf),
        "StreamingLLM": FirstTokens(2) | Window(8),
        "norms": (TopK(6), norms),
        "fraction of the prompt": PromptFraction(0.25, PROMPT) & (FirstTokens(PROMPT) | Window(8)),
        "error mass": ErrorMass(0.4, capacity=TOKENS),
        "sublinear growth": SublinearGrowth(0.5),
        "cooldown": Cooldown(Threshold(0.6), 4),
        "budget": Budget(Threshold(0.6), 5),
        "random": (Threshold(0.75), random),
        "every fourth": (Threshold(0.5), every_fourth),
        "oracle": (Threshold(0.5), asked_for),
        "a retrieval head": Threshold(-torch.inf),
        "the other heads": FirstTokens(2) | Window(8),
    }


def lives() -> dict[str, Tensor]:
    """Lifetimes by the name of the policy, int32 `[T]` each."""
    score, found = scores(), {}
    for name, policy in policies().items():
        selector, given = policy if isinstance(policy, tuple) else (policy, score)
        found[name] = selector(given[None, :, None]).evict_at[0, :, 0]
    return found


def reads() -> dict[str, Tensor]:
    """Which queries read what is stored, by the name of the policy, bool `[T]` each."""
    amor, l2a = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.75
    return {"AMOR": amor, "L2A": l2a}


def draw(names: list[str], columns: int, score: Tensor | None) -> Figure:
    """The lives under some policies, beside the scores that they decide from."""
    found, queries = lives(), reads()
    return plot_lives(
        {name: found[name] for name in names},
        score=score,
        mark=MARKED,
        reads={name: queries[name] for name in names if name in queries},
        columns=columns,
    )


def score_of(names: list[str]) -> Tensor | None:
    """The scores that the policies of a page decide from; None if they read none, or others each."""
    first = policies()[names[0]]
    if isinstance(first, tuple):
        return first[1] if len(names) == 1 else None
    return None if names[0] in UNSCORED else scores()


if __name__ == "__main__":
    here = Path(__file__).with_suffix("")
    here.mkdir(exist_ok=True)
    shown = [name for name in lives() if name not in PAGES["retrieval_heads"]]
    draw(shown, 3, scores()).savefig(here.with_suffix(".png"), dpi=160)
    for page, names in PAGES.items():
        draw(names, 3, score_of(names)).savefig(here / f"{page}.png", dpi=160)
