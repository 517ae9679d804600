"""Estimates: what a computation should take on a GPU, from counts and published rates.

No kernel of hamblocks was timed for them. A kernel takes

    launches * launch + max(tensor cores, last program, L2, memory, latency)

- tensor cores: every program takes the tiles that it really visits (`visits.py`), those with a mask
  MASKED_TILE times as long, behind four accesses to memory that depend on each other. Programs run
  in the order of their launch on the multiprocessors, as many at once as the table of compiled
  kernels says (docs/kernels.md). Where the last ends much later than the average multiprocessor is
  busy, the bound is called "uneven programs".
- L2: bytes that tiles read from the cache. memory: bytes read and written once.
- latency: accesses to memory that wait for each other, as in a program that walks a list.

A phase is a sum of kernels, which run one behind the other. `bound` names what takes the most of it.
A floor (`floors.py`) stands beside each estimate, at the rates of the same chip. `benchmarks/gpu.py`
writes estimates beside measured times: a ratio far from 1 shows which assumption is wrong.

`kernel.py` is the estimate of a kernel, `programs.py` how its programs share a chip.

Letters: C tokens in a chunk, D head size, T tokens.
"""

from measuring.estimates.attention import attention, dense, of_case
from measuring.estimates.decode import (
    DECODE_LAUNCHES,
    PAGE,
    RANDOM_GATE,
    decode,
    read_of_cache,
    slabs_of,
)
from measuring.estimates.kernel import Estimate, kernel, together
from measuring.estimates.layer import ELEMENTWISE, delta_rule, layer
from measuring.estimates.programs import blocks_at_once, makespan

__all__ = [
    "DECODE_LAUNCHES",
    "ELEMENTWISE",
    "PAGE",
    "RANDOM_GATE",
    "Estimate",
    "attention",
    "blocks_at_once",
    "decode",
    "delta_rule",
    "dense",
    "kernel",
    "layer",
    "makespan",
    "of_case",
    "read_of_cache",
    "slabs_of",
    "together",
]
