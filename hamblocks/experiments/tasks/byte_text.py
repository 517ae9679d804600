"""Byte text: real text, and the slice of its bytes that an earlier passage tells."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hamblocks.experiments.corpus import Corpus
from hamblocks.experiments.tasks.protocol import (
    FILLER,
    IGNORED,
    QUESTION,
    VALUE,
    TaskBatch,
    checked_size,
)
from hamblocks.protocols import check_count


@final
class ByteText:
    """Sequences of bytes; every next byte is asked for.

    The recall slice holds the bytes that follow an n-gram which stood earlier in the sequence,
    followed by the same byte (after the associative-recall hits of Zoology, arXiv 2312.04927).
    There `kind` is `QUESTION`. The byte that followed the n-gram when it last stood is labelled:
    storing it gives the answer.
    """

    vocab_size = 256

    def __init__(
        self, corpus: Corpus, length: int = 512, *, order: int = 4, held_out: bool = False
    ) -> None:
        """Makes the task.

        Args:
            corpus: the text.
            length: bytes of a sequence.
            order: bytes of the n-gram.
            held_out: draws from the held-out part instead of the training part.

        Raises:
            ValueError: a size is out of range.
        """
        check_count("order", order, 1)
        check_count("length", length, order + 1)
        self.text = corpus.held_out if held_out else corpus.train
        if len(self.text) <= length:
            raise ValueError(f"corpus: expected more than {length} bytes, got {len(self.text)}")
        self.order = order
        self.size, self.smallest = length, order + 1

    def length(self, size: int) -> int:
        """See `Task.length`; the size is the length."""
        return size

    def text_of(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Passages from random places of the text, int64 `[count, length]`."""
        begin = torch.randint(len(self.text) - length, (count, 1), generator=generator)
        return self.text[begin + torch.arange(length)].long()

    def batch(
        self, count: int, generator: torch.Generator, *, size: int | None = None
    ) -> TaskBatch:
        """See `Task.batch`."""
        size = checked_size(self, size)
        begin = torch.randint(len(self.text) - size, (count, 1), generator=generator)
        drawn = self.text[begin + torch.arange(size + 1)].long()
        tokens, target = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
        source = self._source(drawn)
        known = source >= 0
        label = torch.zeros(count, size + 1, dtype=torch.bool)
        # unknown ones go to an additional last place, which is cut off
        label = label.scatter(1, source.where(known, size), True)[:, :-1]
        kind = torch.full_like(tokens, FILLER).masked_fill(label, VALUE)
        return TaskBatch(tokens, target, kind.masked_fill(known, QUESTION), label)

    def _source(self, drawn: Tensor) -> Tensor:
        """Where the byte after each token stood after the same n-gram, or -1.

        Args:
            drawn: int64 `[B, T + 1]`.

        Returns:
            int64 `[B, T]`: for token t the largest s <= t such that bytes s - order to s equal
            bytes t + 1 - order to t + 1.
        """
        batch, size = drawn.shape[0], drawn.shape[1] - 1
        same = torch.ones(batch, size, size, dtype=torch.bool)
        # [t, s]: byte s - back equals byte t + 1 - back
        for back in range(self.order + 1):
            ends = torch.full((batch, back), IGNORED)
            ahead = torch.cat([ends, drawn], 1)[:, 1 : size + 1]
            behind = torch.cat([ends - 1, drawn], 1)[:, :size]
            same &= ahead[:, :, None] == behind[:, None]
        same &= torch.ones(size, size, dtype=torch.bool).tril()
        latest = size - 1 - same.flip(2).long().argmax(2)
        return latest.where(same.any(2), -1)
