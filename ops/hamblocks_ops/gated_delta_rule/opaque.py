"""The chunked delta rule as it is run: with its own gradient, or as one operator with the same.

In eager mode `Chunked` is the gradient. Compilers and transforms of `torch.func` get the torch
operations of `chunked`. A compiler unrolls their scan over chunks, and an unrolled scan is right for
one number of chunks only. Where the number of tokens is symbolic, one operator hides the chunks from
the compiler, in the backward pass too. That pass computes the chunks a second time and keeps nothing
but the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.declare import without_second_derivative
from hamblocks_ops.dispatch import transformed
from hamblocks_ops.gated_delta_rule.call import (
    DeltaRuleCall,
    DeltaRuleRaw,
    learns,
    per_value_head,
)
from hamblocks_ops.gated_delta_rule.chunked import chunked
from hamblocks_ops.gated_delta_rule.gradient import Chunked, gradient
from hamblocks_ops.lengths import is_symbolic


def run(call: DeltaRuleCall) -> DeltaRuleRaw:
    """Runs a call, unrounded."""
    arguments = per_value_head(call)
    if is_symbolic(call.v.shape[1]):
        return DeltaRuleRaw(*forward(**arguments))
    # one token has no chunks, and transforms differentiate what torch records
    is_eager = not torch.compiler.is_compiling()
    if call.v.shape[1] > 1 and is_eager and learns(call) and not transformed():
        order = "q", "k", "v", "beta", "g", "initial_state", "scale", "cu_seqlens"
        results = Chunked.apply(*(arguments[name] for name in order))  # type: ignore[no-untyped-call]
        return DeltaRuleRaw(*results)
    return DeltaRuleRaw(*chunked(**arguments))


@torch.library.custom_op("hamblocks::gated_delta_rule_chunked", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked` as one operator; results are contiguous."""
    out, residual, state = chunked(
        q,
        k,
        v,
        beta=beta,
        g=g,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return _own(out, v), _own(residual, v), _own(state, v)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    initial_state = rest[2]
    out = initial_state.new_empty(v.shape)
    return out, torch.empty_like(out), _empty(initial_state)


@torch.library.custom_op("hamblocks::gated_delta_rule_chunked_backward", mutates_args=())
def backward(
    grad_out: Tensor,
    grad_residual: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors of `forward` after `grad_state`; results are contiguous."""
    given, grads = (q, k, v, beta, g, initial_state), (grad_out, grad_residual, grad_state)
    with torch.autocast(device_type=q.device.type, enabled=False):
        dq, dk, dv, dbeta, dg, dstate = gradient(given, grads, scale, cu_seqlens)
    return _own(dq, v), _own(dk, v), _own(dv, v), _own(dbeta, v), _own(dg, v), _own(dstate, v)


@backward.register_fake
def _(
    grad_out: Tensor, grad_residual: Tensor, grad_state: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_empty(x) for x in rest[:6])


def _own(result: Tensor, v: Tensor) -> Tensor:
    """A contiguous result; without tokens a copy, because an operator may not return its arguments."""
    return result.contiguous() if v.shape[1] else result.clone()


def _empty(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape of x, whatever the strides of x are."""
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def _autograd_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    return (*backward(*grads, *tensors, ctx.scale, cu_seqlens), None, None)


forward.register_autograd(_autograd_backward, setup_context=_setup_context)
without_second_derivative("gated_delta_rule, compiled for any length,", backward)
