"""Recall: key-value pairs, each once, in text that repeats itself; then keys are asked."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

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
from hamblocks_ops.arguments import wrong


@final
class Recall:
    """A phrase repeats; passages of pairs (key, value) stand in it; then keys are asked.

        f f f f | f f k v k v f f f f k v k v f f ... | SEP k k k k
                                                        asked: v v v v

    The phrase is predictable after its first pass. A pair stands once, so nothing predicts it. All
    keys of a sequence differ, and a key is never a value or in the phrase.
    """

    def __init__(
        self,
        pairs: int = 64,
        length: int = 768,
        *,
        questions: int | None = None,
        symbols: int = 192,
        phrase: int = 4,
        burst: int = 4,
        shared_symbols: bool = True,
    ) -> None:
        """Makes the task.

        Args:
            pairs: pairs in a sequence, a multiple of `burst`.
            length: tokens before the separator, pairs included.
            questions: keys that are asked, at most `pairs`; None: all.
            symbols: size of the alphabet, without the separator.
            phrase: tokens of the phrase.
            burst: pairs that stand in a row.
            shared_symbols: keys, values and phrase come from one alphabet and are drawn anew for
                each sequence, so that no symbol tells what a token is. False: half of the symbols
                are keys; a sixteenth, but at least twice the phrase, are for phrases; the rest are
                values.

        Raises:
            ValueError: a size is out of range.
        """
        for name, value in (("pairs", pairs), ("phrase", phrase), ("burst", burst)):
            check_count(name, value, 1)
        if pairs % burst:
            raise wrong("pairs", f"a multiple of burst = {burst}", str(pairs))
        check_count("length", length, 2 * pairs + phrase)
        self.questions = pairs if questions is None else questions
        check_count("questions", self.questions, 1)
        if self.questions > pairs:
            raise wrong("questions", f"at most pairs = {pairs}", str(questions))
        fillers = max(symbols // 16, 2 * phrase)
        least = phrase + pairs + 1 if shared_symbols else max(2 * pairs, 2 * (fillers + 1))
        check_count("symbols", symbols, least)
        self.pairs, self.full_length, self.symbols = pairs, length, symbols
        self.phrase, self.burst, self.shared_symbols = phrase, burst, shared_symbols
        self.fillers = fillers
        self.vocab_size = symbols + 1
        self.size, self.smallest = pairs, burst

    def length(self, size: int) -> int:
        """See `Task.length`; the share of pairs is the same for all sizes."""
        return self._before(size) + 1 + min(size, self.questions)

    def _before(self, size: int) -> int:
        return max(self.full_length * size // self.pairs, 2 * size + self.phrase)

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """See `Task.batch`; a size is rounded down to a multiple of `burst`."""
        size = checked_size(self, size) // self.burst * self.burst
        before, asked = self._before(size), min(size, self.questions)
        phrase, keys, values = self._symbols(count, size, generator)
        begin = places(
            count,
            size // self.burst,
            2 * self.burst,
            before - 2 * size,
            self.phrase,
            generator,
        )
        at = (begin[..., None] + 2 * torch.arange(self.burst)).flatten(1)
        kind = torch.full((count, before), FILLER).scatter(1, at, KEY).scatter(1, at + 1, VALUE)
        text = repeated(phrase, kind == FILLER).scatter(1, at, keys).scatter(1, at + 1, values)
        order = permutations(count, size, generator)[:, :asked]
        separator = torch.full((count, 1), self.vocab_size - 1)
        tokens = torch.cat([text, separator, keys.gather(1, order)], 1)
        unscored = torch.full((count, before + 1), IGNORED)
        label = torch.zeros(tokens.shape, dtype=torch.bool)
        return TaskBatch(
            tokens,
            torch.cat([unscored, values.gather(1, order)], 1),
            torch.cat([kind, torch.full((count, 1 + asked), QUESTION)], 1),
            label.scatter(1, at.gather(1, order) + 1, True),
        )

    def _symbols(
        self, count: int, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The phrase `[B, phrase]`, the keys and the values `[B, size]` of every sequence."""
        if self.shared_symbols:
            drawn = permutations(count, self.symbols, generator)
            phrase, keys, others = drawn.split(
                [self.phrase, size, self.symbols - self.phrase - size], 1
            )
            index = torch.randint(others.shape[1], (count, size), generator=generator)
            return phrase, keys, others.gather(1, index)
        key_count = self.symbols // 2
        phrase = permutations(count, self.fillers, generator)[:, : self.phrase]
        keys = permutations(count, key_count, generator)[:, :size] + self.fillers
        first = self.fillers + key_count
        values = torch.randint(first, self.symbols, (count, size), generator=generator)
        return phrase, keys, values
