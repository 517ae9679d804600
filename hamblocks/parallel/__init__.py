"""Context parallel: every rank of a process group holds a slice of each sequence."""

from hamblocks.parallel.shard import ContextShard
from hamblocks.slices import HasBorder, HasTransition, Transition

__all__ = ["ContextShard", "HasBorder", "HasTransition", "Transition"]
