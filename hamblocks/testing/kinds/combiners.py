"""Checks of combiners, called as `combiner(x, memory_read, attention_read) -> y`."""

from __future__ import annotations

from hamblocks.testing.common import common
from hamblocks.testing.subjects import CombinerSubject

CHECKS = common(CombinerSubject)
