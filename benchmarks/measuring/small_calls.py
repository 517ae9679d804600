"""The ops that are linear in T, or nearly: their times stand beside a copy of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Shape, cases

from hamblocks.ops import compact, select_threshold, surprise
from measuring.checks import error, within
from measuring.clock import Contender
from measuring.floors import Work


def make(shape: Shape, run: str) -> dict[str, Callable[[], Contender]]:
    """The calls of a shape, forward alone."""
    sizes = 1, shape.tokens, shape.heads, shape.head_dim
    residual, v = torch.randn(sizes), torch.randn(sizes)
    evict_at = select_threshold(torch.rand(sizes[:3]), 1 - shape.fraction)

    def scored() -> dict[str, Any]:
        exact = surprise(residual.double(), v.double(), impl="reference")
        errors = {"score": error(surprise(residual, v), exact)}
        return within("reference in float64", errors, {"score": 1e-5})

    def listed() -> dict[str, Any]:
        stored = compact(evict_at)
        for head in range(shape.heads):
            kept = (evict_at[0, :, head] > torch.arange(shape.tokens)).nonzero()[:, 0]
            length = int(stored.lengths[0, head])
            assert length == len(kept)
            assert torch.equal(stored.position[0, head, :length].long(), kept)
        return {"against": "a comparison of every token"}

    def topk(tokens: int) -> Contender:
        case = cases(topk_tokens=tokens)["select_topk"]()

        def check() -> dict[str, Any]:
            case.check()
            return {"against": "torch.topk"}

        return Contender({}, case.call, check, Work(0, 8 * tokens * shape.heads))

    each = shape.tokens * shape.heads
    return {
        "surprise": lambda: Contender(
            {},
            lambda: surprise(residual, v),
            scored,
            Work(0, (8 * shape.head_dim + 4) * each),
        ),
        "select_topk": lambda: topk(shape.tokens),
        "select_topk of T / 8": lambda: topk(shape.tokens // 8),
        "compact": lambda: Contender({}, lambda: compact(evict_at), listed, Work(0, 8 * each)),
    }
