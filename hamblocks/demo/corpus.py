"""Real text, split into training and held-out parts that share no file."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT_EVERY = 10
"""One file in ten is held out; of a single file, its last tenth."""

LARGEST = 20_000_000
"""Bytes read at the most."""


class Corpus(NamedTuple):
    """Bytes of text.

    Attributes:
        train: uint8 `[bytes]`.
        held_out: uint8 `[bytes]`.
        source: where they come from, in words.
    """

    train: Tensor
    held_out: Tensor
    source: str

    @classmethod
    def standard_library(cls) -> Corpus:
        """The Python sources of the standard library on this machine, split by file."""
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        files = sorted(
            path
            for path in root.rglob("*.py")
            if not skipped.intersection(path.relative_to(root).parts)
        )
        # the hash spreads the modules of a package over both parts, the same way on every machine
        files.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        total = 0
        for index, path in enumerate(files):
            text = path.read_bytes()
            total += len(text)
            if total > LARGEST:
                break
            parts[index % HELD_OUT_EVERY == 0].append(text)
        train, held_out = (b"\0".join(part) for part in parts)
        return cls(
            _bytes(train),
            _bytes(held_out),
            f"Python standard library, {len(parts[0]) + len(parts[1])} files",
        )

    @classmethod
    def from_file(cls, path: Path) -> Corpus:
        """One file: its last tenth is held out.

        Raises:
            ValueError: the file has too little text to train on.
        """
        text = path.read_bytes()[:LARGEST]
        if len(text) < 100_000:
            raise ValueError(
                f"text: expected a file of at least 100,000 bytes, got {path.name} of {len(text):,}"
            )
        border = len(text) - len(text) // HELD_OUT_EVERY
        return cls(_bytes(text[:border]), _bytes(text[border:]), path.name)

    def batches(self, length: int, batch: int, generator: torch.Generator) -> Tensor:
        """Random training rows, int64 `[batch, length + 1]`."""
        begin = torch.randint(len(self.train) - length, (batch,), generator=generator)
        return torch.stack(
            [self.train[start : start + length + 1] for start in begin.tolist()]
        ).long()

    def rows(self, length: int, rows: int) -> Tensor:
        """Held-out rows spread evenly over the part, int64 `[rows, length + 1]`."""
        begin = torch.linspace(0, len(self.held_out) - length - 1, rows).long()
        return torch.stack(
            [self.held_out[start : start + length + 1] for start in begin.tolist()]
        ).long()


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
