"""The delta rule in chunks against token by token, and the cost of the score, on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, normalize

from hamblocks.ops import gated_delta_rule

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 2048, 4, 64
MAX_ERROR = 1e-5
"""Relative error allowed in float32 before the chunked implementation is timed."""
MAX_CHUNKED, MAX_SCORE = 0.5, 1.5
"""Ratios of times: chunked to token by token, and with the score to without."""


def arguments():
    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM) for _ in range(3))
    return (q, normalize(k, dim=-1), v), {
        "beta": torch.rand(BATCH, TOKENS, HEADS),
        "g": logsigmoid(torch.randn(BATCH, TOKENS, HEADS) + 2),
    }


def test_chunked_against_token_by_token(ratio):
    qkv, options = arguments()
    fast = gated_delta_rule(*qkv, **options, impl="chunked")
    exact = gated_delta_rule(*qkv, **options, impl="reference")
    for name in ("out", "residual", "final_state"):
        error = (getattr(fast, name) - getattr(exact, name)).norm()
        assert error <= MAX_ERROR * getattr(exact, name).norm()
    cost = ratio(
        "chunked / token by token",
        lambda: gated_delta_rule(*qkv, **options, impl="chunked"),
        lambda: gated_delta_rule(*qkv, **options, impl="reference"),
        rounds=5,
    )
    assert cost < MAX_CHUNKED


def test_the_score_costs_little(ratio):
    qkv, options = arguments()
    bare = {"output_residual": False}
    cost = ratio(
        "with the cosine score / without a score",
        lambda: gated_delta_rule(*qkv, **options, **bare, metric="cosine"),
        lambda: gated_delta_rule(*qkv, **options, **bare),
    )
    assert cost < MAX_SCORE
