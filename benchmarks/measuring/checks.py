"""Checks results at the shape that is timed, against a path that can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SAMPLED_QUERIES = 256
"""Queries whose attention is compared: dense attention of all of them would not fit."""
COMPARED_TOKENS = 4096
"""Tokens that are compared at once, because a float64 copy of everything may not fit."""
MAX_OUT_ERROR, MAX_GRADIENT_ERROR = 2.0**-7, 2.0**-6
"""Relative errors allowed in bfloat16, by norm. Tensor cores reach some 2**-9 for outputs and about
twice that for gradients."""
FLOAT32 = 2.0**-7
"""Errors allowed in float32, relative to those in bfloat16."""
MASKED_LOGIT = -1e30
"""Logit of a key that a query does not see: finite, so that no gradient is NaN."""


class WrongResultError(Exception):
    """A result is wrong, so it is not timed."""


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to the norm of `exact`; both `[B, T, ...]`."""
    split = (x.detach().split(COMPARED_TOKENS, 1) for x in (got, exact))
    pieces = list(zip(*split, strict=True))
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pieces)
    whole = sum(float(b.double().square().sum()) for _, b in pieces)
    return (wrong / whole) ** 0.5 if whole else float(wrong > 0)


def within(against: str, errors: dict[str, float], allowed: dict[str, float]) -> dict[str, Any]:
    """Checks errors and returns a record of the comparison for the result.

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
    """Dense attention of a sample of queries in float32, and gradients of a loss over them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, cotangent: Tensor
    ) -> None:
        """Computes what is exact.

        Args:
            q: `[1, T, H, D]`.
            k: `[1, T, Hkv, D]`.
            v: `[1, T, Hkv, D]`.
            evict_at: int32 `[1, T, Hkv]`, counted over the whole batch row.
            cotangent: gradient of out, `[1, T, H, D]`; only that of the sampled queries counts.
        """
        tokens, heads = q.shape[1:3]
        drawn = torch.randperm(tokens, device=q.device)[:SAMPLED_QUERIES]
        # the first and the last query are always among them
        at = torch.cat([drawn, drawn.new_tensor([0, tokens - 1])]).unique()
        self.at, self.inputs = at, [x.detach() for x in (q, k, v)]
        self.cotangent = torch.zeros_like(cotangent).index_copy(1, at, cotangent[:, at])
        self.out = torch.empty(1, len(at), *q.shape[2:], device=q.device)
        self.gradients = [
            torch.zeros(1, n, *x.shape[2:], device=q.device)
            for n, x in ((len(at), q), (tokens, k), (tokens, v))
        ]
        group = heads // k.shape[2]
        for head in range(heads):  # one head at a time, which is all that fits
            own = head // group
            out, gradients = self._dense(head, own, evict_at, cotangent)
            self.out[0, :, head] = out
            for whole, part, place in zip(self.gradients, gradients, (head, own, own), strict=True):
                whole[0, :, place] += part

    def _dense(
        self, head: int, own: int, evict_at: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Out of the sampled queries of one head, and gradients of q, k and v.

        own is the key head that they read.
        """
        q, k, v = self.inputs
        one = [x.float() for x in (q[0, self.at, head], k[0, :, own], v[0, :, own])]
        position = torch.arange(k.shape[1], device=k.device)
        at = self.at[:, None]
        visible = (position <= at) & (at < evict_at[0, :, own])
        with torch.enable_grad():
            for x in one:
                x.requires_grad_()
            logits = one[0] @ one[1].T * q.shape[3] ** -0.5
            # the second mask: a query that sees nothing reads 0
            weights = logits.masked_fill(~visible, MASKED_LOGIT).softmax(1) * visible
            out = weights @ one[2]
            gradients = torch.autograd.grad(out, one, cotangent[0, self.at, head].float())
        return out.detach(), gradients

    def check(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], learns: bool
    ) -> dict[str, Any]:
        """Compares out, and with `learns` the gradients of q, k and v.

        Raises:
            WrongResultError: one of them is wrong.
        """
        inputs = [x.clone().requires_grad_(learns) for x in self.inputs]
        with torch.set_grad_enabled(learns):
            out = attend(*inputs)
        errors = {"out": error(out[:, self.at], self.out)}
        if learns:
            dq, dk, dv = torch.autograd.grad(out, inputs, self.cotangent)
            found = zip("qkv", (dq[:, self.at], dk, dv), self.gradients, strict=True)
            errors |= {f"gradient of {name}": error(got, exact) for name, got, exact in found}
        most = FLOAT32 if out.dtype == torch.float32 else 1.0
        allowed = {
            name: most * (MAX_OUT_ERROR if name == "out" else MAX_GRADIENT_ERROR) for name in errors
        }
        return within(f"dense attention of {len(self.at)} queries in float32", errors, allowed)
