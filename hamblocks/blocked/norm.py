"""Vectors divided by their length in blocks: RMSNorm, and unit length."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.blocked import rows_of, spans_of
from hamblocks_ops.recorded import recorded


class Length(NamedTuple):
    """What a vector x is divided by: sqrt(share |x|^2 + eps), at least `least`.

    Attributes:
        share: 1 for unit length, 1 / D for RMSNorm.
        eps: epsilon under the root.
        least: lower bound of the length; 0: none.
    """

    share: float
    eps: float
    least: float

    def of(self, x: Tensor) -> Tensor:
        """The length of x `[..., D]` before it is bounded, `[..., 1]`."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if self.eps or self.share != 1:
            length = (self.share * length.square() + self.eps).sqrt()
        return length

    def inverse(self, x: Tensor) -> Tensor:
        """One over the length of x `[..., D]`, `[..., 1]`."""
        length = self.of(x)
        return (length.clamp(min=self.least) if self.least else length).reciprocal()


def normalize(x: Tensor, weight: Tensor | None, length: Length) -> Tensor:
    """x divided by its length, times a weight, in blocks.

    Args:
        x: `[B, T, ..., D]`.
        weight: `[D]`; None: 1.
        length: the length of a vector.

    Returns:
        The shape of x.
    """
    y: Tensor = _Normalize.apply(x, weight, length)  # type: ignore[no-untyped-call]
    return y


def normalize_at_once(x: Tensor, weight: Tensor | None = None, *, length: Length) -> Tensor:
    """`normalize` in plain ops, of all tokens at once."""
    y = x * length.inverse(x)
    return y if weight is None else y * weight


class _Normalize(torch.autograd.Function):
    """`normalize`, with its gradient.

    With r the inverse of the length, dr = -share r^3 x dx, or 0 where `least` bounds the length.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, length: Length) -> Tensor:
        """Arguments and result of `normalize`."""
        ctx.save_for_backward(x, weight)
        ctx.length = length
        y = torch.empty_like(x)
        for rows in rows_of(x):
            for span in spans_of(x[rows]):
                here, found = x[rows, span], y[rows, span]
                torch.mul(here, length.inverse(here), out=found)
                if weight is not None:
                    found.mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight."""
        x, weight = ctx.saved_tensors
        length: Length = ctx.length
        if torch.is_grad_enabled():  # create_graph=True: torch differentiates what it records
            given = [y for y in (x, weight) if y is not None]
            found = recorded(partial(normalize_at_once, length=length), given, grad)
            return (*found, None, None)[:3]
        of_x = torch.empty_like(x)
        of_weight = None if weight is None else torch.zeros_like(weight)
        for rows in rows_of(x):
            for span in spans_of(x[rows]):
                here, by = x[rows, span], grad[rows, span]
                inverse = length.inverse(here)
                products = (here * by).flatten(0, -2)
                if of_weight is None:
                    along, scaled = products.sum(-1), by
                else:
                    of_weight += torch.mv(products.mT, inverse.flatten())
                    along, scaled = torch.mv(products, weight), by * weight
                curve = along.view_as(inverse) * inverse.square() * -length.share
                if length.least:
                    curve.masked_fill_(length.of(here) < length.least, 0)
                torch.addcmul(scaled, here, curve, out=of_x[rows, span]).mul_(inverse)
        return of_x, of_weight, None
