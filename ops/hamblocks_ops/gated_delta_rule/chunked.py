"""The gated delta rule in chunks on plain torch: any device and floating dtype, differentiable.

A chunk starts with the state S. Let a_i = exp(g_1 + ... + g_i) and D_ij = exp(g_{j+1} + ... + g_i)
for j <= i, 0 otherwise. The residuals R of the chunk solve a unit lower triangular system:

    (I + L) R = V - a * (K S),    L_ij = D_ij beta_j (k_i . k_j) for j < i

This is the WY form of arXiv 2406.06484 with one change: its columns are scaled by beta, not its
rows. The solution is then the residual itself, and nothing is divided by beta. With the residuals,

    O = scale (a * (Q S) + P R),    P_ij = D_ij beta_j (q_i . k_j) for j <= i
    S' = a_last S + (D_last * beta * K)^T R

The inverse of I + L is formed for many chunks at once; only the state goes from chunk to chunk. On
a CPU the chunks are taken in groups whose intermediate results fit the cache. A packed batch is laid
out so that every sequence starts its own chunk, with shapes that depend on no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.dispatch import transformed
from hamblocks_ops.packing import sequence_of

CHUNK, CPU_CHUNK = 64, 32
"""Tokens of a chunk: a compiler and a GPU want few steps, a CPU wants little arithmetic."""
BLOCK = 8
"""Tokens of a block; between two blocks of a chunk, D has rank one."""
SOLVED = 32
"""Size of the triangular systems that are solved by substitution."""
GROUP = 1024
"""Tokens times heads that are taken together on a CPU: with chunks of 32, a matrix `[size, size]`
of every chunk takes 128 KB in float32."""


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    initial_state: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_size: int | None = None,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in the op, q and k already with the heads of v.

    Args:
        q: as in the op, like `k`, `v`, `beta`, `g`, `scale`, `initial_state` and `cu_seqlens`.
        chunk_size: tokens of a chunk, rounded up to a power of two; None chooses.
        kept: gets what `gradient` needs, four tensors for each group of chunks.

    Returns out, residual and final state unrounded.
    """
    wide = initial_state.dtype
    tokens = v.shape[1]
    if tokens == 0:
        return v.to(wide), v.to(wide), initial_state
    if tokens == 1 and cu_seqlens is None and kept is None:
        return _step(
            q.to(wide), k.to(wide), v.to(wide), beta.to(wide), g.to(wide), scale, initial_state
        )
    recorded = transformed() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, beta, g, initial_state))
    )
    layout = Layout.of(v, cu_seqlens, chunk_size, whole=recorded)
    packed = layout.packed
    state = (initial_state if packed is None else torch.zeros_like(initial_state[:1])).flatten(0, 1)
    decays = layout.decays(g)
    outs, residuals = Tokens(layout, wide), Tokens(layout, wide)
    ends: list[Tensor] = []
    for group in layout.groups():
        out, residual, later = _run_group(
            q, k, v, beta, decays, scale, initial_state, state, layout, group, kept
        )
        outs.add(out, group)
        residuals.add(residual, group)
        state = later[-1]
        if packed is not None:
            ends += later
    if packed is not None:
        after = torch.stack(ends).index_select(0, packed.last)
        final = torch.where(packed.empty[:, None, None, None], initial_state, after)
    else:
        final = state.view(initial_state.shape)
    return outs.joined(), residuals.joined(), final


def _run_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decays: Decays,
    scale: float,
    initial_state: Tensor,
    state: Tensor,
    layout: Layout,
    group: Group,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs `[n, size, V]`, residuals `[n, size, V]`, and the states `[B * H, K, V]` after chunks.

    A function of its own, so that the memory of a group is free before the next one begins.
    """
    wide = initial_state.dtype
    q, k, v, beta = (layout.take(x, group, wide) for x in (q, k, v, beta))
    step = Chunks.of(q, k, beta, layout.part(decays, group))
    residual, states, ends = _scan(step, v.flatten(0, 2), initial_state, state, layout, group)
    from_state = torch.bmm(step.decayed[:, layout.size :], states)
    # scale costs nothing here
    reads = step.products[:, layout.size :]
    add = torch.Tensor.baddbmm_ if layout.grouped else torch.baddbmm
    out = add(from_state, reads, residual, beta=scale, alpha=scale)
    if kept is not None:
        kept += [step.inverse, step.products, residual, states]
    return out, residual, ends


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


class Packed(NamedTuple):
    """Where packed tokens go when every sequence starts a chunk of its own."""

    token: Tensor  # [chunks * size] token of every slot, T for an empty one
    slot: Tensor  # [T] slot of every token
    sequence: Tensor  # [chunks] sequence that a chunk belongs to
    starts: Tensor  # [chunks] whether a chunk is the first of its sequence
    last: Tensor  # [N] last chunk of a sequence
    empty: Tensor  # [N] whether a sequence has no token

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, size: int) -> Packed:
        """The layout of sequences with these borders in chunks of `size`."""
        borders = cu_seqlens.long()
        lengths = borders.diff()
        per_sequence = (lengths + size - 1).div(size, rounding_mode="floor")
        ends = per_sequence.cumsum(0)
        first = ends - per_sequence
        # an upper bound of ceil(a) + ceil(b) + ... for any lengths that sum to `tokens`
        total = tokens // size + min(lengths.shape[0], tokens)
        sequence = sequence_of(cu_seqlens, tokens)
        slot = (
            first[sequence] * size + torch.arange(tokens, device=borders.device) - borders[sequence]
        )
        token = torch.full((total * size,), tokens, device=borders.device)
        token = token.scatter(0, slot, torch.arange(tokens, device=borders.device))
        chunk = torch.arange(total, device=borders.device)
        owner = torch.searchsorted(ends, chunk, right=True).clamp(max=lengths.shape[0] - 1)
        return cls(token, slot, owner, chunk == first[owner], (ends - 1).clamp(min=0), lengths == 0)


class Group(NamedTuple):
    """Chunks that are taken together: from `first` up to `stop`."""

    first: int
    stop: int


class Layout(NamedTuple):
    """How tokens `[B, T, H, ...]` are laid out in chunks `[chunks * B * H, size, ...]`.

    The chunk varies slowest, so that one step of the scan is a slice.
    """

    batch: int
    tokens: int
    heads: int
    size: int
    chunks: int
    together: int
    grouped: bool
    packed: Packed | None

    @classmethod
    def of(
        cls,
        v: Tensor,
        cu_seqlens: Tensor | None,
        chunk_size: int | None = None,
        whole: bool = False,
    ) -> Layout:
        """The layout of tokens of the shape of v.

        Args:
            v: `[B, T, H, V]`.
            cu_seqlens: borders of packed sequences.
            chunk_size: tokens of a chunk, at the most; None chooses.
            whole: takes all chunks as one group, in as few steps as possible: what is recorded, to
                be differentiated, keeps every intermediate result anyway.
        """
        batch, tokens, heads = v.shape[:3]
        grouped = v.device.type == "cpu" and not whole and not torch.compiler.is_compiling()
        chunk_size = chunk_size or (CPU_CHUNK if grouped else CHUNK)
        # a power of two, because the inverse is formed by doubling
        size = 1 << (min(chunk_size, tokens) - 1).bit_length()
        packed = None if cu_seqlens is None else Packed.of(cu_seqlens, tokens, size)
        chunks = -(-tokens // size) if packed is None else packed.starts.shape[0]
        together = chunks
        if grouped:
            together = min(chunks, max(1, GROUP // (size * max(1, batch * heads))))
        return cls(batch, tokens, heads, size, chunks, together, grouped, packed)

    @property
    def streams(self) -> int:
        """Batch rows times heads."""
        return self.batch * self.heads

    def groups(self) -> Iterator[Group]:
        """All chunks, in order."""
        for first in range(0, self.chunks, self.together):
            yield Group(first, min(first + self.together, self.chunks))

    def decays(self, g: Tensor) -> Decays:
        """Decays within all chunks: these are small, so they are not taken in groups."""
        return Decays.of(self.take(g, Group(0, self.chunks), g.dtype).flatten(0, 2))

    def part(self, decays: Decays, group: Group) -> Decays:
        """The decays of a group."""
        return Decays(*(x[group.first * self.streams : group.stop * self.streams] for x in decays))

    def take(self, x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        """Tokens of a group, `[B, T, H, ...]` -> `[chunks, B, H, size, ...]`, without a copy.

        Zeros take the place of missing tokens.
        """
        start, stop = group.first * self.size, group.stop * self.size
        missing = 0
        if self.packed is None:
            missing = max(0, stop - self.tokens)
            x = x[:, start:stop]
        else:
            slots = self.packed.token[start:stop]
            held = slots < self.tokens
            x = x.index_select(1, slots.clamp(max=self.tokens - 1))
            # masked_fill and not a product: a token of another sequence may be NaN
            x = x.masked_fill(~held.view(1, -1, *[1] * (x.dim() - 2)), 0)
        x = x.to(dtype)
        if missing:
            x = pad(x, [0, 0] * (x.dim() - 2) + [0, missing])
        y: Tensor = x.unflatten(1, (-1, self.size))
        return y.movedim(3, 2).transpose(0, 1)

    def give(self, x: Tensor, group: Group) -> Tensor:
        """The inverse of `take` without a copy: tokens `[B, chunks, size, H, D]` of a group."""
        x = x.unflatten(0, (group.stop - group.first, self.batch, self.heads))
        return x.transpose(0, 1).movedim(2, 3)


class Tokens:
    """Collects `[B, T, H, D]` from groups of chunks."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.dtype = dtype
        self.all: Tensor | None = None

    def add(self, x: Tensor, group: Group) -> None:
        """Adds chunks `[chunks * B * H, size, D]` of a group; groups come in any order."""
        layout = self.layout
        x = layout.give(x, group)
        if layout.together == layout.chunks:
            self.all = x.to(self.dtype)
            return
        # in place: where torch records what happens, there is one group
        if self.all is None:
            sizes = layout.batch, layout.chunks, *x.shape[2:]
            self.all = x.new_empty(sizes, dtype=self.dtype)
        self.all[:, group.first : group.stop] = x

    def joined(self) -> Tensor:
        """All tokens."""
        assert self.all is not None
        x, layout = self.all.flatten(1, 2), self.layout
        return (
            x[:, : layout.tokens]
            if layout.packed is None
            else x.index_select(1, layout.packed.slot)
        )


class Decays(NamedTuple):
    """Decays within chunks.

    Every one is the exponential of a sum of its own, or a product of such: exact where g is huge,
    and without NaN where it is -inf. A difference of two sums would be neither.
    """

    near: Tensor  # D of two tokens of a block [n, blocks, block, block], 0 above the diagonal
    far: Tensor  # from a token to the start of a later block [n, blocks, size], 0 for others
    head: Tensor  # from the start of a block up to a token [n, blocks, block]
    from_start: Tensor  # a [n, size]

    @classmethod
    def of(cls, g: Tensor) -> Decays:
        """Decays of chunks with log decay g `[n, size]`."""
        size = g.shape[1]
        from_start = g.cumsum(1).exp()
        block = min(BLOCK, size)
        g = g.unflatten(1, (size // block, block))
        near = _between(g)
        # between block j and a later block i lie the blocks j + 1 to i - 1
        between = pad(_between(g.sum(-1))[:, :-1], (0, 0, 1, 0))
        far = (between[..., None] * near[:, None, :, -1]).flatten(2)
        return cls(near, far, g.cumsum(-1).exp(), from_start)

    def pairs(self) -> Tensor:
        """D `[n, size, size]`, 0 above the diagonal."""
        blocks, block = self.head.shape[1:]
        pairs: Tensor = self.head[..., None] * self.far[:, :, None]
        pairs = pairs.unflatten(-1, (blocks, block))
        # the blocks on the diagonal are 0 so far
        pairs.diagonal(0, 1, 3).copy_(self.near.movedim(1, -1))
        return pairs.flatten(3, 4).flatten(1, 2)


def _between(g: Tensor) -> Tensor:
    """exp(g_{j+1} + ... + g_i) for j <= i, 0 otherwise: [..., n] -> [..., n, n]."""
    lower = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    summed = g[..., :, None].expand(*g.shape, g.shape[-1]).masked_fill(~lower, 0).cumsum(-2)
    return summed.exp().tril()


class Chunks(NamedTuple):
    """What the scan over chunks needs of every chunk, `[chunks * B * H, ...]`."""

    from_start: Tensor  # a [n, size]
    pairs: Tensor  # D [n, size, size]
    keys_queries: Tensor  # K above Q [n, 2 size, K]
    written: Tensor  # beta * K [n, size, K]
    products: Tensor  # L above P [n, 2 size, size]; L also has its diagonal
    inverse: Tensor  # of I + L [n, size, size]
    decayed: Tensor  # a * K above a * Q [n, 2 size, K]
    write: Tensor  # D_last * beta * K [n, size, K]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        beta: Tensor,
        decays: Decays,
        made: tuple[Tensor, Tensor] | None = None,
    ) -> Chunks:
        """Prepares chunks, `[chunks, B, H, size, ...]`; `made` are products and inverse if known."""
        size = beta.shape[3]
        from_start, pairs = decays.from_start, decays.pairs()
        both = torch.cat([k, q], 3).flatten(0, 2)
        written = both[:, :size] * beta.flatten(0, 2)[..., None]
        if made is None:
            products = torch.bmm(both, written.mT).unflatten(1, (2, size)) * pairs[:, None]
            made = products.flatten(1, 2), inverse_of(products[:, 0])
        decayed = both.unflatten(1, (2, size)) * from_start[:, None, :, None]
        write = written * pairs[:, -1, :, None]
        return cls(from_start, pairs, both, written, *made, decayed.flatten(1, 2), write)


def inverse_of(lower: Tensor) -> Tensor:
    """The inverse of I + L, with L the part of `lower` below the diagonal, `[n, size, size]`.

    Blocks of up to `SOLVED` by substitution, then by doubling:

        [A 0]^-1   [   A^-1         0  ]
        [C B]    = [-B^-1 C A^-1   B^-1]

    A series in powers of L would take products alone, but large powers cancel in it.
    """
    size = lower.shape[1]
    width = min(SOLVED, size)
    one = torch.eye(width, dtype=lower.dtype, device=lower.device)
    # from the right, because that takes no copy of a matrix stored by rows
    inverse: Tensor = torch.linalg.solve_triangular(
        _diagonal_blocks(lower, width), one, upper=False, left=False, unitriangular=True
    )
    while width < size:
        corner = _diagonal_blocks(lower, 2 * width)[:, width:, :width]
        first, second = inverse.unflatten(0, (-1, 2)).unbind(1)
        inverse = pad(first, (0, width, 0, width))
        inverse[:, width:, width:] = second
        # beta=0: `corner` gives only its shape
        inverse[:, width:, :width] = torch.baddbmm(
            corner, torch.bmm(second, corner), first, beta=0, alpha=-1
        )
        width *= 2
    return inverse


def _diagonal_blocks(x: Tensor, width: int) -> Tensor:
    """`[n, size, size]` -> the blocks on the diagonal `[n * size // width, width, width]`."""
    blocks = x.shape[1] // width
    x = x.reshape(-1, blocks, width, blocks, width)
    return x.diagonal(0, 1, 3).movedim(-1, 1).flatten(0, 1)


def _scan(
    step: Chunks, v: Tensor, initial_state: Tensor, state: Tensor, layout: Layout, group: Group
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Goes from chunk to chunk of a group.

    Returns residuals `[n, size, V]`, the states `[n, K, V]` that chunks start with, and the states
    `[B * H, K, V]` after them.
    """
    size, streams, packed = layout.size, layout.streams, layout.packed
    # split: taking one chunk at a time would have the backward pass write all chunks once per chunk
    pieces = (
        x.split(streams)
        for x in (
            v,
            step.decayed[:, :size],
            step.inverse,
            step.write,
            step.from_start[:, -1:, None],
        )
    )
    # in place what no one else sees; torch and its transforms may record the other form
    add = torch.Tensor.baddbmm_ if layout.grouped else torch.baddbmm
    residuals, states, ends = [], [], []
    for c, (v, keys, inverse, write, decay) in enumerate(zip(*pieces, strict=True), group.first):
        if packed is not None:
            fresh = initial_state.index_select(0, packed.sequence[c : c + 1]).flatten(0, 1)
            state = torch.where(packed.starts[c], fresh, state)
        residual = torch.bmm(inverse, torch.baddbmm(v, keys, state, alpha=-1))
        states.append(state)
        residuals.append(residual)
        state = add(decay * state, write.mT, residual)
        ends.append(state)
    return torch.cat(residuals), torch.cat(states), ends
