"""Unsurprising needles: what is asked for looks like the predictable text when it is read."""

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
class UnsurprisingNeedles:
    """A phrase repeats; marks stand in it, and the answer to a mark is the symbol that followed.

        a b c d a M b c d a b c N d a ... | SEP N M
                                            asked: d b

    The phrase runs on as if the mark were not there. So the token to be stored is the one that the
    text predicts anyway, and a policy that stores surprising tokens stores the mark instead.
    """

    def __init__(
        self, marks: int = 32, length: int = 512, *, symbols: int = 96, phrase: int = 8
    ) -> None:
        """Makes the task.

        Args:
            marks: marks in a sequence; all differ, all are asked.
            length: tokens before the separator.
            symbols: size of the alphabet, from which marks and phrases are drawn anew for each
                sequence.
            phrase: tokens of the phrase.

        Raises:
            ValueError: a size is out of range.
        """
        check_count("marks", marks, 1)
        check_count("phrase", phrase, 2)
        check_count("length", length, 2 * marks + phrase)
        check_count("symbols", symbols, marks + phrase)
        self.marks, self.full_length, self.symbols, self.phrase = marks, length, symbols, phrase
        self.vocab_size = symbols + 1
        self.size, self.smallest = marks, 1

    def length(self, size: int) -> int:
        """See `Task.length`."""
        return self._before(size) + 1 + size

    def _before(self, size: int) -> int:
        return max(self.full_length * size // self.marks, 2 * size + self.phrase)

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """See `Task.batch`."""
        size = checked_size(self, size)
        before = self._before(size)
        drawn = permutations(count, self.symbols, generator)
        phrase, marks = drawn[:, : self.phrase], drawn[:, self.phrase : self.phrase + size]
        # a passage is a mark and the filler token after it
        at = places(count, size, 2, before - 2 * size, self.phrase, generator)
        kind = torch.full((count, before), FILLER).scatter(1, at, KEY)
        text = repeated(phrase, kind == FILLER).scatter(1, at, marks)
        kind = kind.scatter(1, at + 1, VALUE)
        order = permutations(count, size, generator)
        asked = at.gather(1, order)
        separator = torch.full((count, 1), self.vocab_size - 1)
        tokens = torch.cat([text, separator, text.gather(1, asked)], 1)
        target = torch.cat([torch.full((count, before + 1), IGNORED), text.gather(1, asked + 1)], 1)
        kind = torch.cat([kind, torch.full((count, 1 + size), QUESTION)], 1)
        return TaskBatch(tokens, target, kind, kind == VALUE)
