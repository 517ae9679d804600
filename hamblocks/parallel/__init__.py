"""Calls of a layer on several ranks of a process group.

Context parallel: every rank holds slices of each sequence. Tensor parallel: every rank holds some
heads of each layer.
"""

from hamblocks.parallel.shard import ContextShard
from hamblocks.slices import HasBorder, HasTransition, Transition

__all__ = ["ContextShard", "HasBorder", "HasTransition", "Transition"]
