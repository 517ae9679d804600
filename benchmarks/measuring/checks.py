"""What is to be timed is right at the very shape: compared with a path that can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SAMPLES = 256
OUT, GRADIENT = 2.0**-7, 2.0**-6
"""Errors allowed in bfloat16, of the norm: tensor cores fed in it come to some 2**-9, gradients to about twice that."""


class WrongResultError(Exception):
    """A result that is not timed."""


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference, of the norm of what is exact; in pieces, as a copy in float64 may not fit."""
    pieces = list(zip(got.detach().split(4096, 1), exact.detach().split(4096, 1), strict=True))
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pieces)
    whole = sum(float(b.double().square().sum()) for _, b in pieces)
    return (wrong / whole) ** 0.5 if whole else float(wrong > 0)


def within(against: str, errors: dict[str, float], allowed: dict[str, float]) -> dict[str, Any]:
    """What was compared, for the result.

    Raises:
        WrongResultError: an error is larger than allowed, or NaN.
    """
    for name, size in errors.items():
        if not size <= allowed[name]:
            raise WrongResultError(
                f"{name}: error {size:.1e} against {against}, allowed {allowed[name]:.1e}"
            )
    return {"against": against, "errors": errors, "allowed": allowed}


class SampledAttention:
    """Attention of a sample of queries by the dense definition in float32, and gradients of a loss of them alone."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, cotangent: Tensor
    ) -> None:
        tokens, heads = q.shape[1:3]
        drawn = torch.randperm(tokens, device=q.device)[:SAMPLES]
        at = torch.cat([drawn, drawn.new_tensor([0, tokens - 1])]).unique()
        self.inputs = [x.detach() for x in (q, k, v)]
        self.at, self.cotangent = (
            at,
            torch.zeros_like(cotangent).index_copy(1, at, cotangent[:, at]),
        )
        self.out = torch.empty(1, len(at), *q.shape[2:], device=q.device)
        self.gradients = [
            torch.empty(1, n, *q.shape[2:], device=q.device) for n in (len(at), tokens, tokens)
        ]
        position = torch.arange(tokens, device=q.device)
        for head in range(heads):
            one = [x.detach()[0, :, head].float() for x in (q[:, at], k, v)]
            visible = (position <= at[:, None]) & (at[:, None] < evict_at[0, :, head])
            with torch.enable_grad():
                for x in one:
                    x.requires_grad_()
                logits = one[0] @ one[1].T * q.shape[3] ** -0.5
                # a finite number and a second mask: a query that sees nothing reads 0, and no gradient is NaN
                weights = logits.masked_fill(~visible, -1e30).softmax(1) * visible
                out = weights @ one[2]
                found = torch.autograd.grad(out, one, cotangent[0, at, head].float())
            self.out[0, :, head] = out.detach()
            for whole, part in zip(self.gradients, found, strict=True):
                whole[0, :, head] = part

    def check(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], learns: bool
    ) -> dict[str, Any]:
        """Compares out, and with `learns` the gradients of q, k and v."""
        inputs = [x.clone().requires_grad_(learns) for x in self.inputs]
        with torch.set_grad_enabled(learns):
            out = attend(*inputs)
        errors = {"out": error(out[:, self.at], self.out)}
        if learns:
            dq, dk, dv = torch.autograd.grad(out, inputs, self.cotangent)
            for name, got, exact in zip(
                "qkv", (dq[:, self.at], dk, dv), self.gradients, strict=True
            ):
                errors[f"gradient of {name}"] = error(got, exact)
        allowed = {name: OUT if name == "out" else GRADIENT for name in errors}
        return within(f"dense attention of {len(self.at)} queries in float32", errors, allowed)
