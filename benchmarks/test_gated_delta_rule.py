"""The delta rule in chunks against token by token, and what the residual and the score add, on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, normalize

from hamblocks.ops import gated_delta_rule

B, T, HEADS, DIM = 2, 2048, 4, 64


def arguments():
    q, k, v = (torch.randn(B, T, HEADS, DIM) for _ in range(3))
    return (q, normalize(k, dim=-1), v), {
        "beta": torch.rand(B, T, HEADS),
        "g": logsigmoid(torch.randn(B, T, HEADS) + 2),
    }


def test_chunked_against_token_by_token(ratio):
    qkv, options = arguments()
    fast = gated_delta_rule(*qkv, **options, impl="chunked")
    exact = gated_delta_rule(*qkv, **options, impl="reference")
    for name in ("out", "residual", "final_state"):
        assert (getattr(fast, name) - getattr(exact, name)).norm() <= 1e-5 * getattr(
            exact, name
        ).norm()
    cost = ratio(
        "chunked, of token by token",
        lambda: gated_delta_rule(*qkv, **options, impl="chunked"),
        lambda: gated_delta_rule(*qkv, **options, impl="reference"),
        rounds=5,
    )
    assert cost < 0.5


def test_the_score_costs_little(ratio):
    qkv, options = arguments()
    bare = {"output_residual": False}
    cost = ratio(
        "with the cosine score, of without",
        lambda: gated_delta_rule(*qkv, **options, **bare, metric="cosine"),
        lambda: gated_delta_rule(*qkv, **options, **bare),
    )
    assert cost < 1.5
