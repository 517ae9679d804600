"""The gradient of the chunked gated delta rule, written out.

With the names of `chunked`, W = D_last * beta * K, and dX for the gradient of X, a chunk gives, from
the last to the first:

    dR  = dR (given) + scale P^T dO + W dS'
    dX  = (I + L)^-T dR                          of X = V - a * (K S), and of V
    dS  = a_last dS' + scale (a * Q)^T dO - (a * K)^T dX
    dL  = -dX R^T,  dP = scale dO R^T            below the diagonal, P also on it

Only this part is a scan. What follows is done for all chunks of a group at once: L and P are
products of K, Q and beta * K with D, and the gradient of log D is dL * L + dP * P. Its sums over
pairs j < l <= i are the gradient of g_l. As in the forward pass no sum is a difference of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.gated_delta_rule.chunked import (
    BLOCK,
    Chunks,
    Decays,
    Group,
    Layout,
    Tokens,
    chunked,
)
from hamblocks_ops.recorded import recorded

KEPT = 4
"""Tensors that `chunked` keeps of a group."""


class Chunked(torch.autograd.Function):
    """`chunked` with its gradient: saves less and takes fewer passes than what torch records."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor,
        initial_state: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments and results of `chunked`."""
        kept: list[Tensor] = []
        given = q, k, v, beta, g, initial_state
        results = chunked(*given, scale=scale, cu_seqlens=cu_seqlens, kept=kept)
        ctx.save_for_backward(*given, cu_seqlens, *kept)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments."""
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        *given, cu_seqlens = saved[:7]
        if torch.is_grad_enabled():  # create_graph=True: torch differentiates what it records
            again = partial(chunked, scale=ctx.scale, cu_seqlens=cu_seqlens)
            return (*recorded(again, given, grads), None, None)
        return (*gradient(given, grads, ctx.scale, cu_seqlens, saved[7:]), None, None)


def gradient(
    given: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    scale: float,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta, g and the initial state, in their dtypes.

    Args:
        given: q, k, v, beta, g and the initial state, as `chunked` got them.
        grads: of out, residual and the final state; None for zeros.
        scale: as in `chunked`.
        cu_seqlens: as in `chunked`.
        kept: what `chunked` kept; None: it runs again.
    """
    q, k, v, beta, g, initial_state = given
    grad_out, grad_residual, grad_final = grads
    wide = initial_state.dtype
    if v.shape[1] == 0:
        grad_v = torch.zeros_like(v, dtype=wide)
        final = torch.zeros_like(initial_state) if grad_final is None else grad_final
        return (
            *(torch.zeros_like(x) for x in (q, k)),
            grad_v.to(v.dtype),
            *(torch.zeros_like(x) for x in (beta, g)),
            final,
        )
    if kept is None:
        made: list[Tensor] = []
        chunked(*given, scale=scale, cu_seqlens=cu_seqlens, kept=made)
        kept = made
    layout = Layout.of(v, cu_seqlens)
    decays = layout.decays(g)
    carried = _Carried.of(layout, initial_state, grad_final)
    sums = _PairSums(layout.size, g)
    found = [Tokens(layout, x.dtype) for x in (q, k, v, beta, g)]
    for number, group in reversed(list(enumerate(layout.groups()))):
        gradients = _of_group(
            given,
            grad_out,
            grad_residual,
            scale,
            layout,
            group,
            kept[KEPT * number : KEPT * (number + 1)],
            decays,
            carried,
            sums,
        )
        for tokens, one in zip(found, gradients, strict=True):
            tokens.add(one, group)
    return (*(tokens.joined() for tokens in found), carried.initial())


def _of_group(
    given: Sequence[Tensor],
    grad_out: Tensor | None,
    grad_residual: Tensor | None,
    scale: float,
    layout: Layout,
    group: Group,
    kept: Sequence[Tensor],
    decays: Decays,
    carried: _Carried,
    sums: _PairSums,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta and g of a group, `[chunks * B * H, size, ...]`.

    A function of its own, so that the memory of a group is free before the next one begins.
    """
    inverse, products, residual, states = kept
    q, k, _, beta, _, _ = given
    size, wide = layout.size, beta.dtype
    beta = layout.take(beta, group, wide)
    step = Chunks.of(
        layout.take(q, group, wide),
        layout.take(k, group, wide),
        beta,
        layout.part(decays, group),
        (products, inverse),
    )
    # d_both: -dX above scale dO, as `both` is K above Q
    d_both = residual.new_zeros(residual.shape[0], 2 * size, residual.shape[2])
    d_residual = torch.zeros_like(residual)
    d_states = torch.zeros_like(states)
    if grad_residual is not None:
        d_residual.copy_(layout.take(grad_residual, group, wide).flatten(0, 2))
    if grad_out is not None:
        d_out = d_both[:, size:]
        torch.mul(layout.take(grad_out, group, wide).flatten(0, 2), scale, out=d_out)
        d_residual.baddbmm_(products[:, size:].mT, d_out)
        torch.bmm(step.decayed[:, size:].mT, d_out, out=d_states)
    d_v, d_ends = _scan_back(step, d_residual, d_states, d_both, layout, group, carried)
    # through the products with D, and through the state
    d_products = torch.bmm(d_both, residual.mT).unflatten(1, (2, size))
    d_log = (d_products * products.unflatten(1, (2, size))).sum(1)
    d_products *= step.pairs[:, None]
    # the system has no diagonal
    d_products[:, 0].diagonal(0, 1, 2).zero_()
    d_products = d_products.flatten(1, 2)
    from_states = torch.bmm(d_both, states.mT).unflatten(1, (2, size))
    from_states *= step.from_start[:, None, :, None]
    from_states = from_states.flatten(1, 2)
    d_start = (from_states * step.keys_queries).sum(-1).unflatten(1, (2, size)).sum(1)
    d_start[:, -1] += step.from_start[:, -1] * (states * d_ends).sum((1, 2))
    d_write = torch.bmm(residual, d_ends.mT)
    d_write *= step.pairs[:, -1, :, None]
    d_log[:, -1] += (d_write * step.written).sum(-1)
    d_written = d_write.baddbmm_(d_products.mT, step.keys_queries)
    d_keys_queries = from_states.baddbmm_(d_products, step.written)
    d_k, d_q = d_keys_queries.unflatten(1, (2, size)).unbind(1)
    d_beta = (d_written * step.keys_queries[:, :size]).sum(-1)
    d_k.addcmul_(d_written, beta.flatten(0, 2)[..., None])
    return d_q, d_k, d_v, d_beta, sums.of(d_log, d_start)


def _scan_back(
    step: Chunks,
    d_residual: Tensor,
    d_states: Tensor,
    d_both: Tensor,
    layout: Layout,
    group: Group,
    carried: _Carried,
) -> tuple[Tensor, Tensor]:
    """The gradients of v `[n, size, V]`, and of the states that chunks end with `[n, K, V]`.

    Args:
        step: the chunks of a group.
        d_residual: `[n, size, V]`, without what comes from later chunks; this is added.
        d_states: `[n, K, V]`, of the states that chunks start with, from the outputs; the rest is
            added.
        d_both: `[n, 2 size, V]`; the upper half gets the negative gradient of v.
        layout: of all chunks.
        group: which chunks.
        carried: gets the gradient of the state before the group.
    """
    size, streams = layout.size, layout.streams
    d_v, d_ends = torch.empty_like(d_residual), torch.empty_like(d_states)
    keys, decay = step.decayed[:, :size], step.from_start[:, -1:, None]
    for c in reversed(range(group.stop - group.first)):
        here = slice(c * streams, (c + 1) * streams)
        d_end = carried.before_end_of(group.first + c)
        d_ends[here] = d_end
        d_error = d_residual[here].baddbmm_(step.write[here], d_end)
        torch.bmm(step.inverse[here].mT, d_error, out=d_v[here])
        d_start = d_states[here]
        d_start.addcmul_(decay[here], d_end)
        d_start.baddbmm_(keys[here].mT, d_v[here], alpha=-1)
        carried.after_start_of(group.first + c, d_start)
    torch.neg(d_v, out=d_both[:, :size])
    return d_v, d_ends


class _Carried:
    """The gradient of the state on its way from the last chunk to the first."""

    def __init__(self, layout: Layout, state: Tensor, at_end: Tensor | None, total: Tensor) -> None:
        self.packed = layout.packed
        self.state = state
        self.at_end = at_end
        self.total = total

    @classmethod
    def of(cls, layout: Layout, initial_state: Tensor, grad_final: Tensor | None) -> _Carried:
        """What the final states get."""
        packed = layout.packed
        final = torch.zeros_like(initial_state) if grad_final is None else grad_final
        if packed is None:
            return cls(layout, final.flatten(0, 1), None, final)
        empty = packed.empty[:, None, None, None]
        at_end = final.new_zeros(layout.chunks, *final.shape[1:])
        at_end.index_add_(0, packed.last, final.masked_fill(empty, 0))
        # what an empty sequence gets is its final state's
        total = final.masked_fill(~empty, 0)
        return cls(layout, torch.zeros_like(at_end[0]), at_end, total)

    def before_end_of(self, chunk: int) -> Tensor:
        """The gradient `[B * H, K, V]` of the state after a chunk."""
        return self.state if self.at_end is None else self.state + self.at_end[chunk]

    def after_start_of(self, chunk: int, d_start: Tensor) -> None:
        """Takes the gradient `[B * H, K, V]` of the state that a chunk starts with."""
        self.state = d_start
        if self.packed is not None:
            starts = self.packed.starts[chunk]
            of = self.packed.sequence[chunk : chunk + 1]
            self.total.index_add_(0, of, d_start.masked_fill(~starts, 0)[None])
            self.state = d_start.masked_fill(starts, 0)

    def initial(self) -> Tensor:
        """The gradient `[N, H, K, V]` of the initial state."""
        return self.state.view(self.total.shape).clone() if self.packed is None else self.total


class _PairSums:
    """Sums over pairs j < l <= i of a chunk, for every l."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.block = min(BLOCK, size)
        self.blocks = size // self.block

        def lower(n: int, diagonal: int) -> Tensor:
            return torch.ones(n, n, dtype=like.dtype, device=like.device).tril(diagonal)

        self.from_here = lower(self.block, 0)  # [i, l], l <= i
        self.before = lower(self.block, -1).T  # [j, l], j < l
        # of pairs (i, j), which of l lie between
        self.within = (self.from_here[:, None] * self.before).flatten(0, 1)
        after = lower(self.blocks, -1)
        self.across = (after[:, None] * after.T).flatten(0, 1)
        self.earlier = after
        self.all_from_here = lower(size, 0)

    def of(self, pairs: Tensor, from_start: Tensor) -> Tensor:
        """The gradient of g `[n, size]`.

        Args:
            pairs: `[n, size, size]`, of log D.
            from_start: `[n, size]`, of log a.
        """
        n, size = from_start.shape
        x = pairs.view(n, self.blocks, self.block, self.blocks, self.block)
        near = x.diagonal(0, 1, 3).movedim(-1, 1).flatten(2) @ self.within
        # pairs of tokens in different blocks
        by_column, by_row = x.sum(2), x.sum(4)
        columns = (by_column * self.earlier[..., None]).sum(1) @ self.before
        rows = (by_row * self.earlier[:, None]).sum(3) @ self.from_here
        between = by_column.sum(3).flatten(1) @ self.across
        total = (near + columns + rows + between[..., None]).view(n, size)
        return total.addmm_(from_start, self.all_from_here)
