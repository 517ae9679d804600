"""How the cache of a trained model grows on fresh and on repeated symbols."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks.decoder import Decoder
from hamblocks.experiments.models import set_threshold
from hamblocks.experiments.tasks import ByteText, Task

PERIOD = 32
"""Symbols of the passage that is repeated."""


class Growth(NamedTuple):
    """Tokens stored while symbols are read, mean over sequences, layers and heads.

    Attributes:
        threshold: which threshold decides, in words.
        tokens: numbers of tokens seen.
        fresh: stored after each of them, where every passage is new.
        repeated: the same, where one passage of 32 symbols is repeated.
        ratio: fresh over repeated, counted after two repetitions.
    """

    threshold: str
    tokens: list[int]
    fresh: list[float]
    repeated: list[float]
    ratio: float


def symbols(count: int, length: int, alphabet: int, seed: int) -> Tensor:
    """Fresh symbols: permutations of the alphabet in a row, int64 `[count, length]`."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-length // alphabet)
    drawn = torch.rand(count, rounds, alphabet, generator=generator).argsort(2)
    return drawn.flatten(1)[:, :length]


@torch.no_grad()
def measure_growth(
    model: Decoder, task: Task, share: float, *, seed: int, length: int = 512, count: int = 16
) -> list[Growth]:
    """Measures the growth at the model's own threshold and at one that fresh symbols set.

    At its own threshold the model stores `share` of the sequences of its task, which are mostly
    predictable; of fresh symbols it then stores nearly all. The second threshold admits `share` of
    fresh symbols, of which other sequences are drawn.

    Args:
        model: a model with elastic controllers; their thresholds are left at the second one.
        task: the task whose symbols are drawn.
        share: share of the tokens of fresh sequences that the second threshold admits.
        seed: of the symbols.
        length: tokens to read.
        count: sequences.
    """
    model.eval()
    fresh, repeated, others = passages(task, seed, length=length, count=count)
    growth = [_growth("the model's own threshold", model, fresh, repeated)]
    scores = torch.cat([stats.score.flatten() for stats in model(others).stats])
    set_threshold(model, float(scores.quantile(1 - share)))
    name = f"a threshold that {share:.0%} of fresh symbols reach"
    return [*growth, _growth(name, model, fresh, repeated)]


def _growth(name: str, model: Decoder, fresh: Tensor, repeated: Tensor) -> Growth:
    curves = [_stored(model, tokens) for tokens in (fresh, repeated)]
    stored = [late(curve) for curve in curves]
    # one token in all sequences is the least that can be told from none
    least = 1 / len(fresh)
    at = range(7, fresh.shape[1], 8)
    return Growth(
        name,
        [t + 1 for t in at],
        [float(curves[0][t]) for t in at],
        [float(curves[1][t]) for t in at],
        stored[0] / max(stored[1], least),
    )


def _stored(model: Decoder, tokens: Tensor) -> Tensor:
    """Tokens stored after each token, float32 `[T]`, mean over layers."""
    return torch.stack(stored_after(model, tokens)).mean(0)


def stored_after(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Tokens stored after each token, float32 `[T]` per layer; a stored token stays."""
    return [
        (stats.evict_at > stats.position[:, -1:, None]).float().mean((0, 2)).cumsum(0)
        for stats in model(tokens).stats
    ]


def late(curve: Tensor) -> float:
    """Tokens stored after two repetitions, of a curve `[T]` of tokens stored after each token."""
    return float(curve[-1] - curve[2 * PERIOD - 1])


def passages(
    task: Task, seed: int, *, length: int = 512, count: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh tokens, one passage of 32 repeated, and other fresh tokens, int64 `[count, length]`.

    Fresh tokens are text for a task of text, and symbols drawn anew for the others.
    """
    if isinstance(task, ByteText):
        generator = torch.Generator().manual_seed(seed)
        fresh, others = (task.text_of(count, length, generator) for _ in range(2))
    else:
        alphabet = task.vocab_size - 1
        fresh, others = (symbols(count, length, alphabet, seed + i) for i in range(2))
    repeated = fresh[:, :PERIOD].repeat(1, -(-length // PERIOD))[:, :length]
    return fresh, repeated, others
