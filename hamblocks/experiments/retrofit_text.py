"""Text that comes with Python, in two halves: one to align with, one to evaluate on.

A text is in one half or the other by the hash of its name, so both are the same on every machine
with the same version of Python.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple


class Text(NamedTuple):
    """A text by name: `topics/NAME`, a topic of Python's documentation, or `lib/NAME`, a file."""

    name: str
    text: str


def held_out() -> list[Text]:
    """The half that evaluation reads. Nothing is trained, aligned or calibrated on it."""
    return [text for text in _texts() if _is_held_out(text.name)]


def for_alignment() -> list[Text]:
    """The other half: for alignment, distillation, and thresholds."""
    return [text for text in _texts() if not _is_held_out(text.name)]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def _texts() -> list[Text]:
    from pydoc_data.topics import topics

    found = [Text(f"topics/{name}", text) for name, text in sorted(topics.items())]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        found.append(Text(f"lib/{path.name}", path.read_text(encoding="utf-8", errors="replace")))
    return found
