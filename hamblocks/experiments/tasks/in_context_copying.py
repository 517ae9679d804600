"""In-context copying: a random string stands once in repeating text and is then written again."""

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
class InContextCopying:
    """A string with a start mark stands in a phrase that repeats; after a second mark it is copied.

        f f f f START s t r i n g f f f f f f ... START s t r i n
                                          asked:   s    t r i n g

    All symbols of a string differ, and none is in the phrase.
    """

    def __init__(
        self, string: int = 64, length: int = 384, *, symbols: int = 128, phrase: int = 8
    ) -> None:
        """Makes the task.

        Args:
            string: tokens of the string.
            length: tokens before the second mark.
            symbols: size of the alphabet of strings and phrases, without the mark.
            phrase: tokens of the phrase.

        Raises:
            ValueError: a size is out of range.
        """
        check_count("string", string, 1)
        check_count("phrase", phrase, 1)
        check_count("length", length, string + 1 + phrase)
        check_count("symbols", symbols, string + phrase)
        self.string, self.full_length, self.symbols, self.phrase = string, length, symbols, phrase
        self.vocab_size = symbols + 1
        self.size, self.smallest = string, 1

    def length(self, size: int) -> int:
        """See `Task.length`."""
        return self._before(size) + size

    def _before(self, size: int) -> int:
        return max(self.full_length * size // self.string, size + 1 + self.phrase)

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """See `Task.batch`; the size is the length of the string."""
        size = checked_size(self, size)
        before = self._before(size)
        drawn = permutations(count, self.symbols, generator)
        phrase, string = drawn[:, : self.phrase], drawn[:, self.phrase : self.phrase + size]
        mark = torch.full((count, 1), self.vocab_size - 1)
        begin = places(count, 1, size + 1, before - size - 1, self.phrase, generator)
        at = begin + 1 + torch.arange(size)
        kind = torch.full((count, before), FILLER).scatter(1, begin, KEY).scatter(1, at, VALUE)
        text = repeated(phrase, kind == FILLER).scatter(1, begin, mark).scatter(1, at, string)
        tokens = torch.cat([text, mark, string[:, :-1]], 1)
        target = torch.cat([torch.full((count, before), IGNORED), string], 1)
        kind = torch.cat([kind, torch.full((count, size), QUESTION)], 1)
        return TaskBatch(tokens, target, kind, kind == VALUE)
