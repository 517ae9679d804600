"""The bytes of text files as tokens: data for a first run, without a download."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer

from hamblocks_ops.arguments import wrong

VOCAB = 256


class ByteTokenizer(BaseTokenizer):
    """A token is a byte of UTF-8. There are no further tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Has no options."""

    def __init__(self, config: Config, **_: Any) -> None:
        """Makes the tokenizer. torchtitan passes a path too, which is not read."""
        super().__init__()

    def encode(self, text: str, **_: Any) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: list[int], **_: Any) -> str:
        """The text of bytes, with a mark in place of what is not UTF-8."""
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """256."""
        return VOCAB


class FileRows(IterableDataset[tuple[dict[str, Tensor], Tensor]]):
    """Rows of tokens from files laid end to end, in turn for every rank, without an end.

    A row is `({"input": [T], "positions": [T]}, labels [T])`, all int64. Positions count within a
    file, from the beginning of the row at the earliest. The last byte of a file has no label.
    """

    def __init__(self, pattern: str, tokens: int, rank: int, ranks: int) -> None:
        """Reads the files.

        Args:
            pattern: a glob of files; `{stdlib}` stands for the folder of Python's own library.
            tokens: T, the length of a row.
            rank: this rank.
            ranks: number of ranks that share out the rows.

        Raises:
            ValueError: the files hold less than one row.
        """
        names = sorted(glob(pattern.format(stdlib=sysconfig.get_path("stdlib")), recursive=True))
        texts = [text for text in (Path(name).read_bytes() for name in names) if text]
        self.text = torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8)
        self.rows = (len(self.text) - 1) // tokens
        if not texts or not self.rows:
            raise wrong("dataloader.dataset_path", f"files of more than {tokens} bytes", pattern)
        self.ends = torch.tensor([len(text) for text in texts]).cumsum(0)
        self.tokens, self.rank, self.ranks, self.next = tokens, rank, ranks, 0

    def row(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """Row `number` of an endless order."""
        begin = number % self.rows * self.tokens
        place = torch.arange(begin, begin + self.tokens)
        labels = self.text[begin + 1 : begin + self.tokens + 1].long()
        file = torch.searchsorted(self.ends, place, right=True)
        start = torch.where(file > 0, self.ends[file - 1], 0).clamp(min=begin)
        labels[place + 1 == self.ends[file]] = IGNORE_INDEX
        return {"input": self.text[place].long(), "positions": place - start}, labels

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            number = self.next * self.ranks + self.rank
            self.next += 1
            yield self.row(number)

    def state_dict(self) -> dict[str, Any]:
        """The number of rows that this rank has read."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the rows that were read."""
        self.next = state["next"]


class ByteDataLoader(ParallelAwareDataloader):
    """Batches of `FileRows`."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """As torchtitan's; `dataset_path` is a glob of files, by default Python's own library."""

        dataset_path: str | None = "{stdlib}/*.py"

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        """Makes the loader; torchtitan passes all arguments."""
        super().__init__(
            FileRows(config.dataset_path or "", seq_len, dp_rank, dp_world_size),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            prefetch_factor=config.prefetch_factor,
            pin_memory=config.pin_memory,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )
