"""Selective copying: marked items are asked for, distractors that look like items are not."""

from __future__ import annotations

from typing import final

import torch

from hamblocks.experiments.tasks.protocol import (
    FILLER,
    IGNORED,
    KEY,
    QUESTION,
    VALUE,
    TaskBatch,
    checked_size,
    permutations,
    places,
    repeated,
)
from hamblocks.protocols import check_count


@final
class SelectiveCopying:
    """Items behind numbered marks are asked for in order; other items are distractors.

        f f f f M1 a f f c e f f M2 b f f f d g f ... | SEP M1 M2
                                                        asked: a  b

    A distractor is two random symbols in a row, as surprising as a mark and its item, and useless.
    The task follows selective copying (Mamba, arXiv 2312.00752), with marks for the order.
    """

    def __init__(
        self,
        items: int = 32,
        length: int = 512,
        *,
        distractors: int = 32,
        symbols: int = 96,
        phrase: int = 8,
    ) -> None:
        """Makes the task.

        Args:
            items: marked items in a sequence.
            length: tokens before the separator.
            distractors: passages of two random symbols that are not asked for.
            symbols: size of the alphabet of items, distractors and phrases, without the marks.
            phrase: tokens of the phrase.

        Raises:
            ValueError: a size is out of range.
        """
        check_count("items", items, 1)
        check_count("distractors", distractors)
        check_count("phrase", phrase, 1)
        check_count("length", length, 2 * (items + distractors) + phrase)
        check_count("symbols", symbols, phrase + 1)
        self.items, self.full_length, self.distractors = items, length, distractors
        self.symbols, self.phrase = symbols, phrase
        self.vocab_size = symbols + items + 1
        self.size, self.smallest = items, 1

    def length(self, size: int) -> int:
        """See `Task.length`."""
        return self._before(size) + 1 + size

    def _distractors(self, size: int) -> int:
        return self.distractors * size // self.items

    def _before(self, size: int) -> int:
        least = 2 * (size + self._distractors(size)) + self.phrase
        return max(self.full_length * size // self.items, least)

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """See `Task.batch`."""
        size = checked_size(self, size)
        before, passages = self._before(size), size + self._distractors(size)
        drawn = permutations(count, self.symbols, generator)
        phrase, others = drawn[:, : self.phrase], drawn[:, self.phrase :]
        index = torch.randint(others.shape[1], (count, 2 * passages), generator=generator)
        first, second = others.gather(1, index).chunk(2, 1)
        begin = places(count, passages, 2, before - 2 * passages, self.phrase, generator)
        # which of the passages are items; their marks are in order
        marked = permutations(count, passages, generator)[:, :size].sort(1).values
        marks = (self.symbols + torch.arange(size)).expand(count, -1)
        text = repeated(phrase, ~_covered(begin, before))
        text = text.scatter(1, begin, first.scatter(1, marked, marks)).scatter(1, begin + 1, second)
        at = begin.gather(1, marked)
        kind = torch.full((count, before), FILLER).scatter(1, at, KEY).scatter(1, at + 1, VALUE)
        separator = torch.full((count, 1), self.vocab_size - 1)
        tokens = torch.cat([text, separator, marks], 1)
        target = torch.cat([torch.full((count, before + 1), IGNORED), text.gather(1, at + 1)], 1)
        kind = torch.cat([kind, torch.full((count, 1 + size), QUESTION)], 1)
        return TaskBatch(tokens, target, kind, kind == VALUE)


def _covered(begin: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens of passages of two, bool `[B, length]`."""
    empty = torch.zeros(begin.shape[0], length, dtype=torch.bool)
    return empty.scatter(1, begin, True).scatter(1, begin + 1, True)
