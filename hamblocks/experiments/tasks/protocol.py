"""What a task is: it draws sequences, and knows which tokens they are and which are asked for."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hamblocks_ops.arguments import wrong

FILLER, KEY, VALUE, QUESTION = range(4)
"""Kinds of tokens: predictable text, what a question names, what it asks for, the question."""

IGNORED = -100
"""Target of a token whose prediction is not scored, as in `torch.nn.functional.cross_entropy`."""


class TaskBatch(NamedTuple):
    """Sequences of a task.

    Attributes:
        tokens: int64 `[B, T]`.
        target: int64 `[B, T]`, the token to be predicted after each token; -100 where none is
            scored.
        kind: int64 `[B, T]`, one of `FILLER`, `KEY`, `VALUE` and `QUESTION`.
        label: bool `[B, T]`, tokens that a later answer needs: what an oracle stores.
    """

    tokens: Tensor
    target: Tensor
    kind: Tensor
    label: Tensor


@runtime_checkable
class Task(Protocol):
    """Draws sequences of one kind. Equal generators draw equal batches."""

    vocab_size: int
    """Number of symbols."""

    size: int
    """Facts in a sequence of full difficulty; a curriculum begins with fewer."""

    smallest: int
    """The fewest facts that a sequence can have."""

    def length(self, size: int) -> int:
        """Tokens of a sequence with `size` facts."""
        ...

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """Draws sequences.

        Args:
            count: number of sequences, B.
            generator: source of all randomness.
            size: facts in each sequence; None: `self.size`.

        Raises:
            ValueError: `size` is not in [smallest, self.size].
        """
        ...


def checked_size(task: Task, size: int | None) -> int:
    """The size of a batch: the task's own for None.

    Raises:
        ValueError: it is not in [smallest, size].
    """
    size = task.size if size is None else size
    if not task.smallest <= size <= task.size:
        raise wrong("size", f"an integer in [{task.smallest}, {task.size}]", str(size))
    return size


def permutations(count: int, n: int, generator: torch.Generator) -> Tensor:
    """`count` random permutations of n numbers, int64 `[count, n]`."""
    return torch.rand(count, n, generator=generator).argsort(1)


def places(
    count: int, units: int, width: int, filler: int, first: int, generator: torch.Generator
) -> Tensor:
    """Random places of passages in filler, none of them within the first tokens.

    Args:
        count: number of sequences, B.
        units: passages in each.
        width: tokens of a passage.
        filler: tokens of filler in each.
        first: tokens at the beginning that are filler, at most `filler`.
        generator: source of all randomness.

    Returns:
        The first token of each passage, int64 `[B, units]`, ascending. Passages do not overlap.
    """
    order = torch.rand(count, filler + units, generator=generator)
    order[:, :first] = 2  # after every number in [0, 1), so these are never chosen
    chosen = order.argsort(1)[:, :units].sort(1).values
    # a unit before each chosen one is a filler token, or a passage, which is wider
    return chosen + torch.arange(units) * (width - 1)


def repeated(phrase: Tensor, empty: Tensor) -> Tensor:
    """Fills the empty places of a sequence with a phrase that runs on over everything between.

    Args:
        phrase: int64 `[B, P]`.
        empty: bool `[B, T]`.

    Returns:
        int64 `[B, T]`; 0 where nothing is empty.
    """
    count = (empty.long().cumsum(1) - 1).clamp(min=0) % phrase.shape[1]
    return phrase.gather(1, count).where(empty, 0)
