"""The gated delta rule in chunks on plain torch: any device and floating dtype, differentiable.

A chunk starts with the state S. Let G_i be the decay summed up to token i and D_ij = exp(G_i -
G_j). The residuals of the chunk solve a unit lower triangular system:

    r_i + sum_{j<i} D_ij (k_i . k_j) beta_j r_j = v_i - exp(G_i) S^T k_i

This is the WY form of arXiv 2406.06484 with one change: its columns are scaled by beta, not its
rows. The solution is then the residual itself, and nothing is divided by beta.

All chunks are solved at once for both right-hand sides, v and exp(G) k; only the state goes from
chunk to chunk. A packed batch is laid out so that every sequence starts its own chunk, with
shapes that depend on no value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.packing import sequence_of

CHUNK = 64
"""Tokens of a chunk."""


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in the op, q and k already with the heads of v.

    Returns out, residual and final state unrounded.
    """
    wide = initial_state.dtype
    tokens = v.shape[1]
    if tokens == 0:
        return v.to(wide), v.to(wide), initial_state
    if tokens == 1 and cu_seqlens is None:
        return _step(
            q.to(wide), k.to(wide), v.to(wide), beta.to(wide), g.to(wide), scale, initial_state
        )
    size = min(chunk_size, tokens)
    packed = None if cu_seqlens is None else _lay_out(cu_seqlens, tokens, size)

    def chunks(x: Tensor) -> Tensor:
        """`[B, T, H, ...]` -> `[B, H, chunks, size, ...]` in the wide dtype, zeros for padding."""
        x = x.to(wide)
        if packed is None:
            x = pad(x, [0, 0] * (x.dim() - 2) + [0, -tokens % size])
        else:
            x = pad(x, [0, 0] * (x.dim() - 2) + [0, 1])[:, packed.token]
        y: Tensor = x.unflatten(1, (-1, size)).movedim(3, 1)
        return y

    def tokens_of(x: Tensor) -> Tensor:
        """The inverse: [B, H, chunks, size, D] -> [B, T, H, D]."""
        x = x.movedim(1, 3).flatten(1, 2)
        return x[:, :tokens] if packed is None else x[:, packed.slot]

    # g may be -inf (forget everything): sums of it are formed pairwise below, never a difference of
    # two sums.
    step = _Chunks.prepare(chunks(q), chunks(k), chunks(v), chunks(beta), chunks(g), scale)
    out, residual, state = _scan(step, initial_state, packed)
    return tokens_of(out), tokens_of(residual), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token, as in decoding: a chunk of one has no system to solve.

    Sequences and heads are one batch dimension of `bmm`, because `matmul` would take four more ops
    to make it so.
    """
    keys, values = state.shape[2:]
    streams = state.shape[0] * state.shape[1]
    q, k = q.reshape(streams, 1, keys), k.reshape(streams, 1, keys)
    beta, decay = beta.reshape(streams, 1, 1), g.reshape(streams, 1, 1).exp()
    decayed = decay * state.reshape(streams, keys, values)
    residual = v - torch.bmm(k, decayed).view(v.shape)
    error = residual.view(streams, 1, values)
    written = torch.baddbmm(decayed, (beta * k).mT, error)
    # beta=0: `error` gives only its shape
    out = torch.baddbmm(error, q, written, beta=0, alpha=scale)
    return out.view(v.shape), residual, written.view(state.shape)


class _Layout(NamedTuple):
    """Where packed tokens go when every sequence starts a chunk of its own."""

    token: Tensor  # [chunks * size] token of every slot, T for an empty one
    slot: Tensor  # [T] slot of every token
    sequence: Tensor  # [chunks] sequence that a chunk belongs to
    starts: Tensor  # [chunks] whether a chunk is the first of its sequence
    last: Tensor  # [N] last chunk of a sequence
    empty: Tensor  # [N] whether a sequence has no token


def _lay_out(cu_seqlens: Tensor, tokens: int, size: int) -> _Layout:
    borders = cu_seqlens.long()
    lengths = borders.diff()
    per_sequence = (lengths + size - 1).div(size, rounding_mode="floor")
    ends = per_sequence.cumsum(0)
    first = ends - per_sequence
    # an upper bound of ceil(a) + ceil(b) + ... for any lengths that sum to `tokens`
    total = tokens // size + min(lengths.shape[0], tokens)
    sequence = sequence_of(cu_seqlens, tokens)
    slot = first[sequence] * size + torch.arange(tokens, device=borders.device) - borders[sequence]
    token = torch.full((total * size,), tokens, device=borders.device)
    token = token.scatter(0, slot, torch.arange(tokens, device=borders.device))
    chunk = torch.arange(total, device=borders.device)
    owner = torch.searchsorted(ends, chunk, right=True).clamp(max=lengths.shape[0] - 1)
    return _Layout(token, slot, owner, chunk == first[owner], (ends - 1).clamp(min=0), lengths == 0)


class _Chunks(NamedTuple):
    """What the scan over chunks needs of every chunk; [B, H, chunks, size, ...]."""

    solved_v: Tensor
    solved_k: Tensor
    read_state: Tensor
    read_residual: Tensor
    write: Tensor
    decay: Tensor  # [B, H, chunks, 1, 1]

    @classmethod
    def prepare(
        cls, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, scale: float
    ) -> _Chunks:
        size = g.shape[-1]
        ones = torch.ones(size, size, dtype=torch.bool, device=g.device)
        # sum of g over j < l <= i, as a sum of its own for every pair: exact where g is huge,
        # NaN-free where it is -inf
        between = g[..., :, None].expand(*g.shape, size).masked_fill(~ones.tril(-1), 0).cumsum(-2)
        decay = between.masked_fill(~ones.tril(), float("-inf")).exp()
        from_start = g.cumsum(-1).exp()[..., None]
        interaction = (k @ k.mT) * decay * beta[..., None, :]
        solved = torch.linalg.solve_triangular(
            interaction.tril(-1),
            torch.cat([v, from_start * k], -1),
            upper=False,
            unitriangular=True,
        )
        solved_v, solved_k = solved.split([v.shape[-1], k.shape[-1]], -1)
        return cls(
            solved_v=solved_v,
            solved_k=solved_k,
            read_state=scale * from_start * q,
            read_residual=scale * (q @ k.mT) * decay * beta[..., None, :],
            write=(k * (decay[..., -1, :] * beta)[..., None]).mT,
            decay=from_start[..., -1:, :],
        )


def _scan(
    step: _Chunks, initial_state: Tensor, packed: _Layout | None
) -> tuple[Tensor, Tensor, Tensor]:
    state = initial_state if packed is None else torch.zeros_like(initial_state[:1])
    outs, residuals, states = [], [], []
    # unbind: taking one chunk at a time would have the backward pass write all chunks once per
    # chunk
    for c, (solved_v, solved_k, read_state, read_residual, write, decay) in enumerate(
        zip(*(x.unbind(2) for x in step), strict=True)
    ):
        if packed is not None:
            fresh = initial_state.index_select(0, packed.sequence[c : c + 1])
            state = torch.where(packed.starts[c], fresh, state)
        residual = solved_v - solved_k @ state
        outs.append(read_state @ state + read_residual @ residual)
        residuals.append(residual)
        state = decay * state + write @ residual
        if packed is not None:
            states.append(state)
    if packed is not None:
        ended = torch.cat(states).index_select(0, packed.last)
        state = torch.where(packed.empty[:, None, None, None], initial_state, ended)
    return torch.stack(outs, 2), torch.stack(residuals, 2), state
