"""Time of decoding at a keep fraction, relative to decoding with everything stored, on a CPU."""

from __future__ import annotations

import pytest
import torch

import hamblocks as hb

HIDDEN_SIZE, HEADS, SEQUENCES = 512, 8, 8
PREFILL_TOKENS = 1024
"""Tokens per prefill call, which bounds its memory."""
MAX_ERROR = 1e-5
"""Relative error allowed in float32 before a read is timed."""
MAX_TOP_K_GROWTH = 1.15
"""Time of a token with TopK after 8192 tokens, relative to after 1024: noise, and no growth."""


def model(selector, layers=2):
    def layer(index):
        gate = hb.RandomGate(index, per="position", heads="own")
        return hb.HAMLayer(HIDDEN_SIZE, HEADS, gate=gate, selector=selector())

    return hb.Decoder(256, layers, layer).eval()


def decoder(selector, context):
    """A call that decodes one token per sequence after a context, which grows by that token."""
    one = model(selector)
    state = one.init_state(SEQUENCES)
    tokens = torch.randint(256, (SEQUENCES, context))
    for piece in tokens.split(PREFILL_TOKENS, 1):
        state = one(piece, state=state).state

    def step():
        nonlocal state
        state = one(tokens[:, :1], state=state).state

    check(one.blocks[0].layer, state[0])
    return step, state


def check(layer, state):
    """Compares paged attention with the dense reference on the first and the last sequence."""
    for n in (0, SEQUENCES - 1):
        one = state.fork().reorder(torch.tensor([n]))
        keys = one.cache.keys(one.position[:, None])
        q = torch.randn(1, 1, HEADS, HIDDEN_SIZE // HEADS)
        read = [keys.attend(q, impl=impl).out for impl in ("pages", "reference")]
        assert (read[0] - read[1]).norm() <= MAX_ERROR * read[1].norm()


@pytest.mark.parametrize(
    ("fraction", "context", "most"), [(0.1, 8192, 0.35), (0.25, 8192, None), (0.1, 2048, None)]
)
@torch.no_grad()
def test_decode_costs_what_is_kept(ratio, fraction, context, most):
    some, _ = decoder(lambda: hb.Threshold(1 - fraction), context)
    everything, _ = decoder(lambda: hb.Threshold(float("-inf")), context)
    cost = ratio(
        f"a token after {context}: keep fraction {fraction} / everything stored",
        some,
        everything,
    )
    assert most is None or cost <= most


@torch.no_grad()
def test_decode_with_top_k_does_not_grow_with_the_context(ratio):
    late, _ = decoder(lambda: hb.TopK(256), 8192)
    early, _ = decoder(lambda: hb.TopK(256), 1024)
    cost = ratio("a token with TopK(256): after 8192 / after 1024", late, early, rounds=41)
    assert cost <= MAX_TOP_K_GROWTH
