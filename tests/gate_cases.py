"""Traces that tests of gates draw."""

from __future__ import annotations

import torch

import hamblocks as hb
from hamblocks.ops import surprise

DIMS = hb.LayerDims(12, 4, 2, 4)


def trace_of(seed, batch, tokens, heads=4, metric=None, begin=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, residual = (torch.randn(batch, tokens, heads, 4, generator=generator) for _ in range(3))
    position = torch.arange(begin, begin + tokens).to(torch.int32).expand(batch, tokens)
    score = None if metric is None else surprise(residual, v, metric=metric)
    beta = k[..., 0].sigmoid()
    trace = hb.MemoryTrace(k, v, beta, None if metric else residual, score, position, metric)
    stored_k, stored_v = torch.randn(2, batch, tokens, 2, 4, generator=generator)
    return trace._replace(stored_k=stored_k, stored_v=stored_v)


def score_of(gate, trace):
    return gate(torch.zeros(*trace.k.shape[:2], 12), trace).score


def without_memory(trace):
    """The trace of a layer without a memory."""
    return trace._replace(beta=None, residual=None, score=None)
