"""The gated delta rule by the kernels of flash-linear-attention (fla).

https://github.com/fla-org/flash-linear-attention

fla's public function does not return `v_new`, which is beta times the residual; the functions that
it is made of do. `chunks` calls them in the same order, so that `out` has the bits of fla, and one
more kernel (in `triton/residual.py`) reads residual and score off v_new. In the backward pass the gradient
of the residual is added to that of v_new before the gradient of the states is computed. Where beta
is 0, 2**-64 takes its place: `out` stays the same to the bit, and the division by beta is defined.

Every operator here has output shapes that depend on input shapes alone, so torch.compile traces it
as one node.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hamblocks_ops.declare import without_second_derivative
from hamblocks_ops.dispatch import launches
from hamblocks_ops.gated_delta_rule.call import DeltaRuleCall, DeltaRuleRaw
from hamblocks_ops.gated_delta_rule.triton.residual import CHUNK, beta_grad, residual_and_score

MIN_BETA = 2.0**-64
"""What takes the place of a smaller beta where something is divided by it."""
MIN_G = -128.0
"""What takes the place of a smaller log decay: its exp is 0 in float32, and sums over a chunk are
still precise. fla subtracts running sums of g, and a difference of two infinite sums is NaN."""


def run(call: DeltaRuleCall) -> DeltaRuleRaw:
    """Runs a call."""
    arguments = *call[:5], call.initial_state, call.cu_seqlens, call.scale
    out, residual, state, score, _, _ = chunks(*arguments, call.output_residual, call.metric)
    return DeltaRuleRaw(out, residual, state, None if call.metric is None else score)


class _Packed(NamedTuple):
    """Borders and chunks of a packed batch.

    Attributes:
        borders: int64 `[N+1]`, as fla takes them.
        chunks: int64 `[C, 2]`, for each chunk its sequence and its number within the sequence.
    """

    borders: Tensor
    chunks: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The two as arguments of fla's functions."""
        return {"cu_seqlens": self.borders, "chunk_indices": self.chunks}


_last_packed: tuple[weakref.ref[Tensor], int, int, _Packed] | None = None
"""The borders that came last, their version, the number of tokens, and what was made of them."""


def _packed(cu_seqlens: Tensor | None, tokens: int) -> _Packed | None:
    """Borders and chunks of a packed batch; None without packing.

    All layers of a model are given the same borders, forward and backward, so the last result is
    kept. Nothing is kept while a CUDA graph is captured, whose replays may see other borders, and
    of tensors whose changes torch does not count.
    """
    global _last_packed
    if cu_seqlens is None:
        return None
    if cu_seqlens.is_inference() or (
        cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return _made_packed(cu_seqlens, tokens)
    key, last = (cu_seqlens._version, tokens), _last_packed
    if last is not None and last[0]() is cu_seqlens and last[1:3] == key:
        return last[3]
    packed = _made_packed(cu_seqlens, tokens)
    _last_packed = weakref.ref(cu_seqlens), *key, packed
    return packed


def _made_packed(cu_seqlens: Tensor, tokens: int) -> _Packed:
    """What `_packed` returns, without waiting for the device.

    How many chunks there are depends on the borders, which only the device knows. So there are as
    many as `tokens` tokens of N sequences can have at most: N sequences have fewer than N * CHUNK
    tokens more than whole chunks. The chunks too many are those after the end of the last sequence.
    They hold no token, so fla's kernels write nothing for them, and what they read of the states
    are rows of their own.
    """
    borders = cu_seqlens.long()
    sequences = borders.shape[0] - 1
    most = (tokens + min(sequences, tokens) * (CHUNK - 1)) // CHUNK
    # ends[n] is the number of chunks up to and including sequence n
    ends = ((borders.diff() + (CHUNK - 1)) // CHUNK).cumsum(0)
    number = torch.arange(most, device=borders.device)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=sequences - 1)
    begins = F.pad(ends, [1, 0])
    return _Packed(borders, torch.stack([sequence, number - begins[sequence]], 1))


def _at(packed: _Packed | None) -> dict[str, Tensor]:
    """The arguments by which fla is told of packing: none without it."""
    return {} if packed is None else packed.arguments


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


@torch.library.custom_op("hamblocks::gated_delta_rule_fla", mutates_args=())
@launches
def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    writes: bool,
    metric: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass in chunks of CHUNK tokens.

    Args:
        writes: whether to write the residual.
        metric: the metric of the score; None writes no score.

    Returns:
        out `[B, T, HV, V]`; residual, empty unless `writes`; the final state; score `[B, T, HV]`,
        empty without a metric; and for the backward pass the running sums of the decay within each
        chunk, in base 2, and the inverse of the triangular system of each chunk.
    """
    made = _empty(v, g, initial_state, writes, metric)
    _, residual, state, score, _, _ = made
    if v.numel() == 0:
        # no kernel takes an empty grid
        state.copy_(initial_state)
        return made
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    at = _at(_packed(cu_seqlens, v.shape[1]))
    if writes or metric is not None:
        beta = beta.clamp(min=MIN_BETA)
    q, k, v, beta, initial_state = _contiguous(q, k, v, beta, initial_state)
    with torch.autocast(device_type=q.device.type, enabled=False):
        # running sums of the decay within each chunk; fla's kernels take exp2, hence the factor 1 /
        # ln 2
        sums = chunk_local_cumsum(
            g.clamp(min=MIN_G).contiguous(), chunk_size=CHUNK, scale=RCP_LN2, **at
        )
        # the triangular system of each chunk: its inverse times beta * k (w) and times beta * v (u)
        w, u, inverse = chunk_gated_delta_rule_fwd_intra(
            k=k, v=v, g=sums, beta=beta, chunk_size=CHUNK, **at
        )
        # the state before each chunk (h), and v_new = u - w h, which is beta * residual
        h, v_new, state = chunk_gated_delta_rule_fwd_h(
            k=k,
            w=w,
            u=u,
            g=sums,
            initial_state=initial_state,
            output_final_state=True,
            chunk_size=CHUNK,
            **at,
        )
        # what the queries read: of the state before the chunk, and of the tokens within it
        out = chunk_fwd_o(q=q, k=k, v=v_new, h=h, g=sums, scale=scale, chunk_size=CHUNK, **at)
        if writes or metric is not None:
            residual_and_score(v_new, beta, v, MIN_BETA, residual, score, metric)
    return out, residual, state, score, sums, inverse


@chunks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    writes: bool,
    metric: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(v, g, initial_state, writes, metric)


def _empty(
    v: Tensor, g: Tensor, initial_state: Tensor, writes: bool, metric: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `chunks` returns, uninitialised."""
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape if writes else (0,)),
        initial_state.new_empty(initial_state.shape),
        g.new_empty((0,) if metric is None else g.shape),
        g.new_empty(g.shape),
        v.new_empty(*g.shape, CHUNK),
    )


@torch.library.custom_op("hamblocks::gated_delta_rule_fla_backward", mutates_args=())
@launches
def chunks_backward(
    grad: Tensor | None,
    grad_residual: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and initial_state, in this order.

    `grad`, `grad_residual` and `grad_state` are the gradients of the results; None for a result
    that nothing depends on. `sums` and `inverse` come from the forward pass. States and v_new are
    computed again rather than kept: they are as large as all activations together.
    """
    if v.numel() == 0:
        dq, dk, dv, dbeta, dg, dh0 = (
            torch.zeros_like(x) for x in (q, k, v, beta, sums, initial_state)
        )
        if grad_state is not None:
            dh0.copy_(grad_state)
        return dq, dk, dv, dbeta, dg, dh0
    from fla.ops.common.chunk_delta_h import (
        chunk_gated_delta_rule_bwd_dhu,
        chunk_gated_delta_rule_fwd_h,
    )
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
    from fla.ops.utils import chunk_local_cumsum

    packed = _packed(cu_seqlens, v.shape[1])
    at: dict[str, Any] = _at(packed)
    sized = {"chunk_size": CHUNK, **at}
    if grad_residual is not None:
        beta = beta.clamp(min=MIN_BETA)
    q, k, v, beta, initial_state = _contiguous(q, k, v, beta, initial_state)
    do = torch.zeros_like(v) if grad is None else grad.contiguous()
    dht = None if grad_state is None else grad_state.contiguous()
    with torch.autocast(device_type=q.device.type, enabled=False):
        # the forward pass again, from the inverses on
        w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=inverse, g=sums, **at)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(
            k=k, w=w, u=u, g=sums, initial_state=initial_state, output_final_state=False, **sized
        )
        # what reaches v_new through the outputs of its own chunk
        local = dv = chunk_bwd_dv_local(q=q, k=k, g=sums, do=do, scale=scale, **sized)
        if grad_residual is not None:
            # residual = v_new / beta, so its gradient reaches v_new divided by beta
            dv = (local + grad_residual / beta[..., None]).to(v.dtype)
        # the gradient of the state after each chunk, from the last chunk to the first; dv also gets
        # what reaches v_new through later chunks
        dh, dh0, dv = chunk_gated_delta_rule_bwd_dhu(
            q=q, k=k, w=w, g=sums, h0=initial_state, dht=dht, do=do, dv=dv, scale=scale, **sized
        )
        # gradients of q, k and the decay through reads and writes, and of w
        dq, dk, dw, dg = chunk_bwd_dqkwg(
            q=q, k=k, v=v_new, w=w, g=sums, h=h, dv=dv, do=do, dh=dh, scale=scale, **sized
        )
        # through the triangular systems: the rest of the gradients of k, v, beta and the decay
        more, dv, dbeta, dg_more = prepare_wy_repr_bwd(
            k=k, v=v, beta=beta, g=sums, A=inverse, dw=dw, du=dv, **at
        )
        # the gradient of a running sum, summed from the end of the chunk, is that of g
        dg = chunk_local_cumsum(dg.add_(dg_more), reverse=True, **sized)
        if grad_residual is not None:
            # fla's dbeta is computed before the division of the residual by beta. The missing term
            # nearly cancels it, so the sum of both is computed by a kernel of its own (see
            # triton/residual.py).
            dbeta = beta_grad(k, dh, sums, beta, v_new, local, dv, MIN_BETA, packed)
    return dq, dk.add_(more), dv, dbeta, dg, dh0


@chunks_backward.register_fake
def _(
    grad: Tensor | None,
    grad_residual: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, beta, sums, initial_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, ctx.scale, _writes, _metric = inputs
    _out, residual, _state, score, sums, inverse = output
    ctx.save_for_backward(q, k, v, beta, initial_state, cu_seqlens, sums, inverse, g)
    # gradients that nothing depends on stay None: no zeros are made, and no residual is
    # differentiated for nothing
    ctx.set_materialize_grads(False)
    empty = () if residual.numel() else (residual,)
    ctx.mark_non_differentiable(score, sums, inverse, *empty)


def _autograd_backward(
    ctx: Any,
    grad: Tensor | None,
    grad_residual: Tensor | None,
    grad_state: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor | None, ...]:
    *saved, g = ctx.saved_tensors
    # g was clamped to MIN_G, so below it the gradient is zero
    *grads, dg, dh0 = chunks_backward(grad, grad_residual, grad_state, *saved, ctx.scale)
    return *grads, dg.masked_fill(g < MIN_G, 0), dh0, None, None, None, None


without_second_derivative("gated_delta_rule, impl='fla',", chunks_backward)
chunks.register_autograd(_autograd_backward, setup_context=_setup_context)
