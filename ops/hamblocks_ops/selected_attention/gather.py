"""Attention over the stored tokens at the cost of the stored tokens: gather them, then SDPA over blocks of queries.

Tokens that are stored for good are gathered once, in order: what a block of queries sees of them is a slice, without a
mask. Tokens that will be evicted and are seen by the whole block are gathered for the block, without a mask. What
remains differs from query to query; it is covered the same way by smaller blocks, and the few tokens that are stored or
evicted within one of those get a mask. Each kind is one call of SDPA and the results are merged by their log-sum-exp;
the backward pass of SDPA, given the merged result, yields each part's share of the gradient. Heads that keep about as
many tokens go through one call, so that no head is charged for its neighbours. Sums are float32 whatever the storage.

The work depends on the values of evict_at, so torch sees one opaque operator with static output shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.compact import compact
from hamblocks_ops.packing import NEVER
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.sdpa import attend as _attend
from hamblocks_ops.selected_attention.sdpa import attend_backward as _attend_backward

BLOCK, EDGE, FEW = 1024, 256, 160
"""Queries per block and per smaller block: SDPA is fastest on many queries, a mask cheapest on few. A block that has
FEW keys or less to mask goes without smaller blocks; FEW keys or less that need no mask get no call of their own."""

DIRECT = 8
"""Up to so many queries, as in decoding, all keys are attended to where they lie: nothing is worth gathering."""

HIDDEN = -(2.0**96)
"""Logit of what a query does not see, at the most; times any difference of two positions it is still finite."""


class _Call(NamedTuple):
    """What forward and backward are given; one batch of sequences of equal length."""

    q: Tensor
    k: Tensor
    v: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None
    query_position: Tensor
    key_position: Tensor

    def of(self, own: slice) -> _Call:
        """The tokens of one sequence of a packed batch."""
        return _Call(*(None if x is None else x[:, own] for x in self))  # type: ignore[arg-type]


class _Tokens(NamedTuple):
    """Flat indices (b * Tk + j) * Hkv + h of keys, int64 [R, n], and which of them count (None: all)."""

    flat: Tensor
    filled: Tensor | None


class _Part(NamedTuple):
    """Keys for one call of SDPA, n of them for each of R rows; a row is one (batch, kv head), see `_Stored.order`."""

    rows: slice
    queries: slice
    keys: slice | _Tokens  # slots of what is stored for good, or the tokens
    mask: Tensor | None  # [R, 1, 1 or i, n], 0 or at most HIDDEN

    @property
    def first(self) -> bool:
        """No part before it has any of its queries."""
        return self.queries == slice(None) and isinstance(self.keys, slice) and self.keys.start == 0

    @property
    def own(self) -> tuple[slice, slice, slice]:
        """Its queries in [rows, G, queries]."""
        return self.rows, slice(None), self.queries


class _Stored:
    """The tokens that are ever stored, per row: first those stored for good, then the others; each padded on its own.

    Attributes:
        order: int64 [R], the rows by how much they store for good, the order of all lists below; None: as they are.
        position, until, token: [R, P + S]; padding is never visible.
        lasting: P
    """

    def __init__(self, call: _Call) -> None:
        key_position, evict_at = call.key_position, call.evict_at
        batch, keys, kv_heads = evict_at.shape
        if call.query_position.shape[1]:  # what comes after the last query is not stored yet
            begun = key_position <= call.query_position.amax(1)[:, None, None]
            evict_at = torch.where(begun, evict_at, key_position)
        row = torch.arange(batch * kv_heads, device=evict_at.device)[:, None]
        lists = []
        for lasting in (True, False):
            stored = compact(
                torch.where((evict_at == NEVER) == lasting, evict_at, key_position),
                position=key_position,
            )
            index, position, until = (x.flatten(0, 1) for x in stored[:3])
            token = (row // kv_heads * keys + index) * kv_heads + row % kv_heads
            token = token.masked_fill_(index == keys, 0)
            if lasting:
                self.lasting = index.shape[1]
                lengths = stored.lengths.flatten()
                alike = len(list(_groups(lengths.tolist()))) == 1
                self.order = None if alike else lengths.argsort(descending=True)
                if bool((position.diff(dim=1) < 0).any()):  # a cache in another order than time
                    position, by_time = position.sort(dim=1)
                    token, until = token.gather(1, by_time), until.gather(1, by_time)
            own = (position, until, token)
            lists.append(own if self.order is None else tuple(x[self.order] for x in own))
        self.position, self.until, self.token = (
            torch.cat(pair, 1) for pair in zip(*lists, strict=True)
        )
        self.begins = self.position[:, : self.lasting].contiguous()

    def tokens(self, rows: slice, slot: Tensor, filled: Tensor | None) -> _Tokens:
        """The tokens in some slots of some rows, [R, n]."""
        return _Tokens(self.token[rows].gather(1, slot), filled)

    def by(self, time: Tensor) -> Tensor:
        """How many tokens are stored for good at or before time [R, n], int64 [R, n]."""
        return torch.searchsorted(self.begins, time.contiguous(), right=True)


class _Rest(NamedTuple):
    """What no part covers yet: of what is stored for good the slots from `begin` on, and some of the others [R, S]."""

    begin: int
    others: Tensor


class _Span(NamedTuple):
    """Some queries of a block in some rows."""

    rows: slice
    queries: slice
    first: Tensor  # their times, [R, 1]
    last: Tensor
    begun: int  # so many slots of every row began by the first
    ended: int  # and no row has more that began by the last


class _Block:
    """One block of queries, asked at time [R, i], and the parts that they see, each key once."""

    def __init__(self, stored: _Stored, time: Tensor, dtype: torch.dtype) -> None:
        self.stored, self.dtype = stored, dtype
        edges = torch.cat([time, time[:, -1:].expand(-1, -time.shape[1] % EDGE)], 1)
        self.first, self.last = edges.unflatten(1, (-1, EDGE)).aminmax(dim=2)
        self.origin = self.first.amin(1, keepdim=True)
        self.asked = self.since(time, slice(None))

    def since(self, moment: Tensor, rows: slice) -> Tensor:
        """Time since the first query, in units of -HIDDEN: a mask is then one difference, cut at 0."""
        passed: Tensor = moment.long() - self.origin[rows]
        return passed.to(self.dtype).mul_(-HIDDEN)

    def parts(self) -> Iterator[_Part]:
        """For each run of rows that store about as much."""
        begun, ended = self.stored.by(self.first), self.stored.by(self.last)
        for rows, most in _groups(ended.amax(1).tolist()):
            begins, ends = begun[rows].amin(0).tolist(), ended[rows].amax(0).tolist()
            first, last = self.first[rows], self.last[rows]
            whole = _Span(
                rows, slice(None), first.amin(1, True), last.amax(1, True), min(begins), most
            )
            others = torch.ones_like(
                self.stored.until[rows, self.stored.lasting :], dtype=torch.bool
            )
            around = yield from self._seen_by_all(whole, _Rest(0, others))
            if most - around.begin <= FEW and others.shape[1] == 0:
                yield from self._seen_by_some(whole, around)
                continue
            for edge, counts in enumerate(zip(begins, ends, strict=True)):
                queries = slice(edge * EDGE, edge * EDGE + EDGE)
                span = _Span(rows, queries, first[:, edge, None], last[:, edge, None], *counts)
                rest = yield from self._seen_by_all(span, around)
                yield from self._seen_by_some(span, rest)

    def _seen_by_all(self, span: _Span, rest: _Rest) -> Generator[_Part, None, _Rest]:
        """Parts without a mask; returns what they leave."""
        stored, begin = self.stored, rest.begin
        if span.begun > begin + FEW:
            begin = span.begun
            yield _Part(span.rows, span.queries, slice(rest.begin, begin), None)
        if rest.others.shape[1] == 0:
            return _Rest(begin, rest.others)
        others = span.rows, slice(stored.lasting, None)
        seen = (
            rest.others
            & (stored.position[others] <= span.first)
            & (span.last < stored.until[others])
        )
        for some, slot, filled in _pack(seen, span.rows.start):
            mask = (
                None
                if filled is None
                else torch.where(filled, 0.0, HIDDEN).to(self.dtype)[:, None, None]
            )
            yield _Part(
                some, span.queries, stored.tokens(some, slot + stored.lasting, filled), mask
            )
        return _Rest(begin, rest.others & ~seen)

    def _seen_by_some(self, span: _Span, rest: _Rest) -> Iterator[_Part]:
        """Parts with a mask for all that is left."""
        stored, rows, asked = self.stored, span.rows, self.asked[:, span.queries, None]
        if span.ended > rest.begin:
            slots = slice(rest.begin, span.ended)
            mask = asked[rows] - self.since(stored.position[rows, slots], rows)[:, None]
            yield _Part(rows, span.queries, slots, mask.clamp_(max=0)[:, None])
        if rest.others.shape[1] == 0:
            return
        others = rows, slice(stored.lasting, None)
        seen = (
            rest.others
            & (stored.position[others] <= span.last)
            & (span.first < stored.until[others])
        )
        for some, slot, filled in _pack(seen, rows.start):
            slot += stored.lasting
            begins, ends = (x[some].gather(1, slot) for x in (stored.position, stored.until))
            if filled is not None:
                begins = begins.masked_fill(~filled, NEVER)
            mask = asked[some] - self.since(begins, some)[:, None]
            torch.minimum(mask, self.since(ends - 1, some)[:, None] - asked[some], out=mask)
            yield _Part(
                some, span.queries, stored.tokens(some, slot, filled), mask.clamp_(max=0)[:, None]
            )


def _groups(counts: list[int]) -> Iterator[tuple[slice, int]]:
    """Runs of rows with about as many keys, and the largest count of the run."""
    begin = 0
    while begin < len(counts):
        end, least, most = begin + 1, counts[begin], counts[begin]
        while end < len(counts) and max(most, counts[end]) * 0.95 - 64 <= min(least, counts[end]):
            least, most = min(least, counts[end]), max(most, counts[end])
            end += 1
        yield slice(begin, end), most
        begin = end


def _pack(alive: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Runs of rows with about as many alive slots: rows (from `first` on), their slots [R, n], which are filled."""
    counts = alive.sum(1)
    for rows, size in _groups(counts.tolist()):
        if size == 0:
            continue
        some = slice(first + rows.start, first + rows.stop)
        slot = alive[rows].nonzero()[:, 1]
        if slot.numel() == size * (rows.stop - rows.start):
            yield some, slot.view(-1, size), None
        else:
            filled = torch.arange(size, device=alive.device) < counts[rows, None]
            yield (
                some,
                torch.zeros_like(filled, dtype=torch.int64).masked_scatter_(filled, slot),
                filled,
            )


def _widened(call: _Call, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v in the arithmetic's dtype, and the scale of their logits.

    A bias is one more column of q and k, so that SDPA also gives its gradient; the scale goes into q then, so that
    the column needs no division.
    """
    dtype = wide(call.q)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if call.logit_bias is None:
        return q, k, v, scale
    q = torch.cat([scale * q, torch.ones_like(q[..., :1])], -1)
    k = torch.cat([k, call.logit_bias.to(dtype)[..., None]], -1)
    return q, k, pad(v, [0, 1]), 1.0


class _Operands:
    """q, k, v as rows, one per sequence and key/value head, and what of them is stored."""

    def __init__(self, call: _Call, scale: float) -> None:
        self.kv_heads, self.dim = call.k.shape[2:]
        self.group = call.q.shape[2] // self.kv_heads
        self.stored = _Stored(call)
        self.order = self.stored.order
        self.time = call.query_position.repeat_interleave(self.kv_heads, 0)
        if self.order is not None:
            self.time = self.time[self.order]
        self.q, k, v, self.scale = _widened(call, scale)
        self.rescale = 1.0 if call.logit_bias is None else scale
        self.width = self.q.shape[-1]
        self.flat = [x.reshape(-1, self.width) for x in (k, v)]
        everything = slice(None), slice(self.stored.lasting)
        self.lasting_tokens = _Tokens(
            self.stored.token[everything], self.stored.position[everything] < NEVER
        )
        self.lasting = self._keys(self.lasting_tokens)

    def blocks(self) -> Iterator[tuple[slice, Iterator[_Part]]]:
        """Blocks of queries, and the parts that each sees."""
        for start in range(0, self.time.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            yield block, _Block(self.stored, self.time[:, block], self.q.dtype).parts()

    def _keys(self, tokens: _Tokens) -> list[Tensor]:
        """k and v of tokens, as [R, 1, n, D]; zero where none counts, for what is not stored may be anything."""
        shape = *tokens.flat.shape, self.width
        keys = [x.index_select(0, tokens.flat.flatten()).view(shape) for x in self.flat]
        if tokens.filled is not None:
            hole = (~tokens.filled).nonzero(as_tuple=True)
            keys = [x.index_put_(hole, x.new_zeros(())) for x in keys]
        return [x[:, None] for x in keys]

    def rows(self, x: Tensor) -> Tensor:
        """Queries [B, i, H, ...] as rows [B * Hkv, G, i, ...]."""
        x = x.unflatten(2, (self.kv_heads, self.group)).movedim(1, 3).flatten(0, 1)
        return x if self.order is None else x[self.order]

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse: [B * Hkv, G, i, ...] -> [B, i, H, ...]."""
        x = x if self.order is None else x[self.order.argsort()]
        y: Tensor = x.unflatten(0, (-1, self.kv_heads)).movedim(3, 1).flatten(2, 3)
        return y

    def gather(self, part: _Part) -> tuple[Tensor, Tensor]:
        """k and v of a part, [R, G, n, D]."""
        if isinstance(part.keys, _Tokens):
            k, v = self._keys(part.keys)
        else:
            k, v = (x[part.rows, :, part.keys] for x in self.lasting)
        return k.expand(-1, self.group, -1, -1), v.expand(-1, self.group, -1, -1)


def _forward(call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    if call.q.shape[1] <= DIRECT and call.q.numel() and call.k.numel():
        return _direct(call, scale)
    operands = _Operands(call, scale)
    out, lse = _empty(call.q)
    for block, parts in operands.blocks():
        asked = operands.rows(operands.q[:, block])
        have = torch.zeros_like(asked, memory_format=torch.contiguous_format)
        have_lse = torch.full_like(have[..., 0], 2 * HIDDEN)
        for part in parts:
            own = part.own
            more, more_lse = _attend(asked[own], *operands.gather(part), part.mask, operands.scale)
            if part.first:
                have[own], have_lse[own] = more, more_lse
                continue
            old_lse = have_lse[own]
            total = torch.logaddexp(old_lse, more_lse)
            have[own].mul_((old_lse - total).exp_()[..., None]).addcmul_(
                more, (more_lse - total).exp_()[..., None]
            )
            have_lse[own] = total
        blind = have_lse < HIDDEN / 2
        if bool(blind.any()):
            have.masked_fill_(blind[..., None], 0)
            have_lse.masked_fill_(blind, float("-inf"))
        out[:, block], lse[:, block] = (
            operands.tokens(have)[..., : operands.dim],
            operands.tokens(have_lse),
        )
    return out, lse


def _direct(call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    """The same for few queries: one call with a mask over all keys, in place; the queries of a group are one block."""
    q, k, v, scale = _widened(call, scale)
    kv_heads, dim = call.k.shape[2:]
    time, begins, ends = (
        call.query_position[:, None, :, None],
        call.key_position.mT,
        call.evict_at.mT,
    )
    visible = (begins[:, :, None] <= time) & (time < ends[:, :, None])
    asked = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    mask = torch.where(visible, q.new_zeros(()), float("-inf")).repeat(1, 1, asked.shape[2], 1)
    blind = ~visible.any(-1)[:, :, None]

    def attend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        have, have_lse = _attend(
            asked.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), mask, scale
        )
        have = have.view(asked.shape).masked_fill(blind[..., None], 0)
        return have, have_lse.view(asked.shape[:-1]).masked_fill(blind, float("-inf"))

    have, have_lse = attend(k, v)
    if not bool(
        have.isfinite().all()
    ):  # what is not stored may be anything, and 0 times infinity is NaN
        unseen = ~visible.any(2).mT[..., None]
        have, have_lse = attend(*(x.masked_fill(unseen, 0) for x in (k, v)))
    out, lse = _empty(call.q)
    out.copy_(have[..., :dim].permute(0, 3, 1, 2, 4).reshape(out.shape))
    lse.copy_(have_lse.permute(0, 3, 1, 2).reshape(lse.shape))
    return out, lse


def _backward(
    grad: Tensor, call: _Call, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias (empty without one)."""
    q, k, _, _, logit_bias, *_ = call
    operands = _Operands(call, scale)
    bias_column = [0, operands.width - operands.dim]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    flat, lasting = ([torch.zeros_like(x) for x in xs] for xs in (operands.flat, operands.lasting))
    for block, parts in operands.blocks():
        asked = operands.rows(operands.q[:, block])
        wanted, read = (
            pad(operands.rows(x[:, block].to(operands.q.dtype)), bias_column) for x in (grad, out)
        )
        # a query that sees nothing meets only hidden logits: exp(HIDDEN - 0) = 0
        read_lse = operands.rows(lse[:, block]).clamp(min=HIDDEN / 2)
        change = torch.zeros_like(asked, memory_format=torch.contiguous_format)
        for part in parts:
            own = part.own
            more_q, *more = _attend_backward(
                wanted[own],
                asked[own],
                *operands.gather(part),
                read[own],
                read_lse[own],
                part.mask,
                operands.scale,
            )
            change[own] += more_q
            for whole, kept, share in zip(flat, lasting, more, strict=True):
                share = share.sum(1, keepdim=True)
                if isinstance(part.keys, _Tokens):
                    _add_keys(whole, part.keys, share)
                else:
                    kept[part.rows, :, part.keys] += share
        dq[:, block] = operands.rescale * operands.tokens(change)[..., : operands.dim]
    for whole, kept in zip(flat, lasting, strict=True):
        _add_keys(whole, operands.lasting_tokens, kept)
    dk, dv = (x.view(*k.shape[:3], operands.width) for x in flat)
    dbias = (
        grad.new_empty(0)
        if logit_bias is None
        else dk[..., operands.dim].to(logit_bias.dtype, copy=True)
    )
    dk, dv = (x[..., : operands.dim].to(k.dtype, copy=True) for x in (dk, dv))
    return dq, dk, dv, dbias


def _add_keys(whole: Tensor, tokens: _Tokens, share: Tensor) -> None:
    """Adds [R, 1, n, D] to the keys that the tokens are; the share of padding is zero."""
    whole.index_add_(0, tokens.flat.flatten(), share.flatten(0, 2))


def _sequences(cu_seqlens: Tensor | None) -> list[slice]:
    """The tokens of every sequence of a packed batch; all tokens of a batch that is not packed."""
    if cu_seqlens is None:
        return [slice(None)]
    borders = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(borders) if stop > start]


@torch.library.custom_op("hamblocks::selected_attention_gather", mutates_args=())
def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `reference`; returns out in the dtype of q, and lse."""
    with torch.autocast(device_type=q.device.type, enabled=False):
        call = _Call(q, k, v, evict_at, logit_bias, query_position, key_position)
        if cu_seqlens is None:
            return _forward(call, scale)
        out, lse = _empty(q)
        for own in _sequences(cu_seqlens):
            out[:, own], lse[:, own] = _forward(call.of(own), scale)
        return out, lse


@gather.register_fake
def _(q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """What `gather` returns, uninitialised; `out` unrounded, for the backward pass reads it again."""
    return q.new_empty(q.shape, dtype=wide(q)), q.new_empty(q.shape[:3], dtype=wide(q))


@torch.library.custom_op("hamblocks::selected_attention_gather_backward", mutates_args=())
def gather_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    query_position: Tensor,
    key_position: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and logit_bias (empty without one) from the gradient of out."""
    with torch.autocast(device_type=q.device.type, enabled=False):
        call = _Call(q, k, v, evict_at, logit_bias, query_position, key_position)
        if cu_seqlens is None:
            return _backward(grad, call, out, lse, scale)
        grads = _empty_grads(grad, q, k, v, logit_bias)
        for own in _sequences(cu_seqlens):
            for whole, part in zip(
                grads,
                _backward(grad[:, own], call.of(own), out[:, own], lse[:, own], scale),
                strict=True,
            ):
                if whole.numel():
                    whole[:, own] = part
        return grads


@gather_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict_at: Tensor,
    logit_bias: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(grad, q, k, v, logit_bias)


def _empty_grads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `gather_backward` returns, uninitialised."""
    bias = grad.new_empty(0) if logit_bias is None else logit_bias.new_empty(logit_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = gather_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, dbias if dbias.numel() else None, None, None, None, None


gather.register_autograd(_autograd_backward, setup_context=_setup_context)
