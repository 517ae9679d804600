"""Real text in two parts, one for training and one held out."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT_EVERY = 10
"""One file in ten is held out; if the text is a single file, its last tenth is."""

LARGEST = 20_000_000
"""The largest number of bytes that are read."""


class Corpus(NamedTuple):
    """Text as bytes.

    Attributes:
        train: uint8 `[bytes]`, the training part.
        held_out: uint8 `[bytes]`, the held-out part.
        source: what the text is, in words.
    """

    train: Tensor
    held_out: Tensor
    source: str

    @classmethod
    def standard_library(cls) -> Corpus:
        """The Python sources of the standard library on this machine; no file is in both parts."""
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        files = sorted(
            path
            for path in root.rglob("*.py")
            if not skipped.intersection(path.relative_to(root).parts)
        )
        # Sorting by hash spreads the modules of a package over both parts, alike on every machine.
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
        """One file, whose last tenth is held out.

        Raises:
            ValueError: the file has fewer than 100,000 bytes.
        """
        text = path.read_bytes()[:LARGEST]
        if len(text) < 100_000:
            raise ValueError(
                f"text: expected a file of at least 100,000 bytes, got {path.name} of {len(text):,}"
            )
        border = len(text) - len(text) // HELD_OUT_EVERY
        return cls(_bytes(text[:border]), _bytes(text[border:]), path.name)

    def batch(self, length: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Training sequences from random places, int64 `[batch_size, length + 1]`."""
        begin = torch.randint(len(self.train) - length, (batch_size,), generator=generator)
        return torch.stack(
            [self.train[start : start + length + 1] for start in begin.tolist()]
        ).long()

    def sequences(self, length: int, count: int) -> Tensor:
        """Held-out sequences from evenly spread places, int64 `[count, length + 1]`."""
        begin = torch.linspace(0, len(self.held_out) - length - 1, count).long()
        return torch.stack(
            [self.held_out[start : start + length + 1] for start in begin.tolist()]
        ).long()


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
