"""Decoding at a keep fraction f against decoding with everything stored, on a CPU."""

from __future__ import annotations

import pytest
import torch

import hamblocks as hb
from hamblocks.ops import paged_attention

HIDDEN, HEADS, BATCH = 512, 8, 8


def model(selector, layers=2):
    def layer(index):
        return hb.HAMLayer(HIDDEN, HEADS, gate=hb.RandomGate(index), selector=selector())

    return hb.Decoder(256, layers, layer).eval()


def decoder(selector, context):
    """A call that decodes one token of every sequence, behind a context; it runs on as the context grows."""
    one = model(selector)
    state = one.init_state(BATCH)
    tokens = torch.randint(256, (BATCH, context))
    for piece in tokens.split(1024, 1):
        state = one(piece, state=state).state

    def step():
        nonlocal state
        state = one(tokens[:, :1], state=state).state

    check(one.blocks[0].layer, state[0])
    return step, state


def check(layer, state):
    """What is to be timed is right at this shape: pages read in place against the dense reference, two rows of them."""
    cache = state.fork().cache
    for n in (0, BATCH - 1):
        one = cache.fork().reorder(torch.tensor([n]))
        position = one.seen[:, None]
        q = torch.randn(1, 1, HEADS, HIDDEN // HEADS)
        read = [
            paged_attention(q, one.slabs, one.block_table, query_position=position, impl=impl).out
            for impl in ("pages", "reference")
        ]
        assert (read[0] - read[1]).norm() <= 1e-5 * read[1].norm()


@pytest.mark.parametrize(
    ("fraction", "context", "most"), [(0.1, 8192, 0.35), (0.25, 8192, None), (0.1, 2048, None)]
)
@torch.no_grad()
def test_decode_costs_what_is_kept(ratio, fraction, context, most):
    some, _ = decoder(lambda: hb.Threshold(1 - fraction), context)
    everything, _ = decoder(lambda: hb.Threshold(float("-inf")), context)
    cost = ratio(
        f"a token behind {context}, keep fraction {fraction}, of everything stored",
        some,
        everything,
    )
    assert most is None or cost <= most


@torch.no_grad()
def test_decode_with_top_k_does_not_grow_with_the_context(ratio):
    late, _ = decoder(lambda: hb.TopK(256), 8192)
    early, _ = decoder(lambda: hb.TopK(256), 1024)
    assert (
        ratio("a token with TopK(256) behind 8192, of one behind 1024", late, early, rounds=41)
        <= 1.15
    )
