"""The gated delta rule on a CPU, and the implementations of others in plain torch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from cases import Shape
from torch import Tensor
from torch.nn.functional import normalize

from hamblocks.ops import gated_delta_rule
from measuring import floors
from measuring.checks import error, within
from measuring.clock import Contender, NotHereError

MAX_ERROR = 1e-4
"""Relative error allowed in float32."""
Run = Callable[..., tuple[Tensor, ...]]


def make(shape: Shape, run: str) -> dict[str, Callable[[], Contender]]:
    """The calls of a shape; those of others write no residual."""
    sizes = 1, shape.tokens, shape.heads, shape.head_dim
    q, k, v = (normalize(torch.randn(sizes), dim=-1) for _ in range(3))
    beta, g = torch.rand(sizes[:3]), -torch.rand(sizes[:3]) / 50
    leaves = [x.requires_grad_(run == "both") for x in (q, k, v, beta, g)]
    cotangent = torch.randn(sizes)
    exact: list[Any] = []

    def results(run_one: Run) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with torch.set_grad_enabled(run == "both"):
            got = run_one(*leaves)
        gradients = torch.autograd.grad(got[0], leaves, cotangent) if run == "both" else ()
        return tuple(x.detach() for x in got), gradients

    def contender(run_one: Run) -> Contender:
        def check() -> dict[str, Any]:
            if not exact:
                exact.append(results(_ours("reference")))
            got, wanted = results(run_one), exact[0]
            pairs = [*zip(got[0], wanted[0], strict=False), *zip(got[1], wanted[1], strict=True)]
            errors = {str(n): error(*pair) for n, pair in enumerate(pairs)}
            return within("reference", errors, dict.fromkeys(errors, MAX_ERROR))

        work = floors.delta_rule(
            *sizes[1:], item=4, residual=True, score=False, learns=run == "both"
        )
        return Contender({}, lambda: results(run_one), check, work)

    return {
        "chunked": lambda: contender(_ours("chunked")),
        "no residual": lambda: contender(_ours("chunked", output_residual=False)),
        "no residual, cosine score": lambda: contender(
            _ours("chunked", output_residual=False, metric="cosine")
        ),
        "token by token": lambda: contender(_ours("reference")),
        "transformers": lambda: contender(_transformers()),
        "fla's naive chunks": lambda: contender(_fla()),
    }


def _ours(impl: str, **options: Any) -> Run:
    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        result = gated_delta_rule(q, k, v, beta=beta, g=g, impl=impl, **options)
        return (result.out,) if result.residual is None else (result.out, result.residual)

    return call


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise NotHereError(f"{module}: {error}") from error


def _transformers() -> Run:
    # unwrapped: with fla installed the decorated function calls fla, which has no kernel for a CPU
    rule = inspect.unwrap(
        _found("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule")
    )
    return lambda q, k, v, beta, g: rule(q, k, v, g, beta)[:1]


def _fla() -> Run:
    rule = _found("fla.ops.gated_delta_rule.naive", "naive_chunk_gated_delta_rule")
    return lambda q, k, v, beta, g: rule(q, k, v, g, beta)[:1]
