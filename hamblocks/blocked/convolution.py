"""The causal depthwise convolution of a few taps and SiLU, in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hamblocks.blocked import rows_of, spans_of
from hamblocks_ops.recorded import recorded


def convolve(x: Tensor, past: Tensor, weight: Tensor, activates: bool) -> Tensor:
    """The sum over taps, and SiLU of it, in blocks.

    Args:
        x: `[B, T, C]`.
        past: `[B, taps - 1, C]`, the inputs before x, oldest first.
        weight: `[C, taps]`; the last tap weighs the token itself.
        activates: whether SiLU follows.

    Returns:
        `[B, T, C]`.
    """
    y: Tensor = _Convolve.apply(x, past, weight, activates)  # type: ignore[no-untyped-call]
    return y


def convolve_at_once(x: Tensor, past: Tensor, weight: Tensor, activates: bool) -> Tensor:
    """`convolve` in plain ops, of all tokens at once."""
    known, tokens = past.shape[1], x.shape[1]
    inputs = torch.cat([past, x], 1)
    delayed = [inputs[:, known - delay : known - delay + tokens] for delay in range(known + 1)]
    return weighted(delayed, weight, activates)


def weighted(delayed: Sequence[Tensor], weight: Tensor, activates: bool) -> Tensor:
    """The sum over taps, and SiLU of it; `delayed[n]` is x as it was n tokens ago."""
    y = weight[:, -1] * delayed[0]
    for delay in range(1, len(delayed)):
        y = torch.addcmul(y, weight[:, -1 - delay], delayed[delay])
    return F.silu(y) if activates else y


class _Convolve(torch.autograd.Function):
    """`convolve`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor, weight: Tensor, activates: bool) -> Tensor:
        """Arguments and result of `convolve`."""
        ctx.save_for_backward(x, past, weight)
        ctx.activates = activates
        y, taps = torch.empty_like(x), weight.mT.contiguous()
        for rows in rows_of(x):
            for span in spans_of(x[rows]):
                found = y[rows, span]
                _sum(_inputs(x[rows], past[rows], span), taps, found)
                if activates:
                    F.silu(found, inplace=True)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, past and weight."""
        x, past, weight = given = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: torch differentiates what it records
            again = partial(convolve_at_once, activates=ctx.activates)
            return (*recorded(again, given, grad), None)
        taps = weight.mT.contiguous()
        of_x, of_past = torch.empty_like(x), torch.empty_like(past)
        of_taps = torch.zeros_like(taps)
        for rows in rows_of(x):
            later = torch.zeros_like(past[rows])  # gradients of the sums just after a block
            for span in reversed(spans_of(x[rows])):
                inputs = _inputs(x[rows], past[rows], span)
                of_sum = grad[rows, span]
                if ctx.activates:
                    y = torch.empty_like(x[rows, span])
                    _sum(inputs, taps, y)
                    of_sum = torch.ops.aten.silu_backward(of_sum, y)
                for back in range(len(taps)):
                    here = inputs[:, back : back + of_sum.shape[1]]
                    of_taps[back] += (here * of_sum).sum((0, 1))
                both = torch.cat([of_sum, later], 1)
                _sum(both, taps.flip(0), of_x[rows, span])
                later = both[:, : past.shape[1]]
            # the gradient of the past, from the sums of the first tokens
            nothing = torch.zeros_like(later)
            _sum(torch.cat([nothing, later], 1)[:, 1:], taps.flip(0)[1:], of_past[rows])
        return of_x, of_past, of_taps.mT, None


def _inputs(x: Tensor, past: Tensor, span: slice) -> Tensor:
    """The inputs of a span of tokens, and those before it that its first token sees."""
    known = past.shape[1]
    if span.start >= known:
        return x[:, span.start - known : span.stop]
    return torch.cat([past, x[:, : span.stop]], 1)[:, span.start :]


def _sum(inputs: Tensor, taps: Tensor, out: Tensor) -> None:
    """Sum over taps `[taps, C]` of inputs `[B, taps - 1 + T, C]`, into out `[B, T, C]`."""
    tokens = out.shape[1]
    torch.mul(inputs[:, len(taps) - 1 :][:, :tokens], taps[-1], out=out)
    for back in range(2, len(taps) + 1):
        out.addcmul_(inputs[:, len(taps) - back :][:, :tokens], taps[-back])
