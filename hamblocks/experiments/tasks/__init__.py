"""Tasks: generators of sequences that ask for what must have been stored."""

from hamblocks.experiments.tasks.byte_text import ByteText
from hamblocks.experiments.tasks.in_context_copying import InContextCopying
from hamblocks.experiments.tasks.protocol import (
    FILLER,
    IGNORED,
    KEY,
    QUESTION,
    VALUE,
    Task,
    TaskBatch,
)
from hamblocks.experiments.tasks.recall import Recall
from hamblocks.experiments.tasks.selective_copying import SelectiveCopying
from hamblocks.experiments.tasks.unsurprising_needles import UnsurprisingNeedles

__all__ = [
    "FILLER",
    "IGNORED",
    "KEY",
    "QUESTION",
    "VALUE",
    "ByteText",
    "InContextCopying",
    "Recall",
    "SelectiveCopying",
    "Task",
    "TaskBatch",
    "UnsurprisingNeedles",
]
