"""Attention over the stored tokens at the cost of the stored tokens: gather them, then SDPA over blocks of queries.

Tokens that are stored for good are gathered once, in order: what a block of queries sees of them is a prefix, without a
mask. Tokens that will be evicted and are seen by the whole block are gathered for the block, without a mask. Those at
the edge, stored or evicted within the block, are few and get one. Each kind is one call of SDPA and the results are
merged by their log-sum-exp; the backward pass of SDPA, given the merged result, yields each part's share of the
gradient. Heads that keep about as many tokens go through one call, so that no head is charged for its neighbours. Sums
are float32 whatever the storage.

The work depends on the values of evict_at, so torch sees one opaque operator with static output shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.packing import NEVER
from hamblocks_ops.select import compact

BLOCK = 768
"""Queries per block: larger ones gather less often, smaller ones have a smaller edge."""

HIDDEN = -1e30
"""Logit of what a query does not see: finite, so that no call of SDPA meets a row without a maximum."""


class _Tokens(NamedTuple):
    """Flat indices (b * Tk + j) * Hkv + h of keys, int64 [R, n], and which of them count (None: all)."""

    flat: Tensor
    filled: Tensor | None


class _Part(NamedTuple):
    """Keys for one call of SDPA, n of them for each of R rows; a row is one (batch, kv head), see `_Stored.order`."""

    rows: slice
    source: int | _Tokens  # length of a prefix of what is stored for good, or the tokens
    mask: Tensor | None  # [R, 1, 1 or i, n], 0 or HIDDEN


class _Stored:
    """The tokens that are ever stored, per row: first those stored for good, then the others; each padded on its own.

    Attributes:
        order: int64 [R], the rows by how much they store for good; all lists below are in this order.
        position, until, token: [R, P + S]; padding is never visible.
        lasting: P
    """

    def __init__(self, key_position: Tensor, evict_at: Tensor) -> None:
        batch, keys, kv_heads = evict_at.shape
        row = torch.arange(batch * kv_heads, device=evict_at.device)[:, None]
        lists = []
        for lasting in (True, False):
            stored = compact(torch.where((evict_at == NEVER) == lasting, evict_at, key_position), position=key_position)
            index, position, until = (x.flatten(0, 1) for x in stored[:3])
            token = (row // kv_heads * keys + index) * kv_heads + row % kv_heads
            token = token.masked_fill_(index == keys, 0)
            if lasting:
                self.lasting = index.shape[1]
                self.order = stored.lengths.flatten().argsort(descending=True)
                if bool((position.diff(dim=1) < 0).any()):  # a cache in another order than time
                    position, by_time = position.sort(dim=1)
                    token, until = token.gather(1, by_time), until.gather(1, by_time)
            lists.append((position[self.order], until[self.order], token[self.order]))
        self.position, self.until, self.token = (torch.cat(pair, 1) for pair in zip(*lists, strict=True))

    def tokens(self, rows: slice, slot: Tensor, filled: Tensor | None) -> _Tokens:
        """The tokens in some slots of some rows, [R, n]."""
        return _Tokens(self.token[rows].gather(1, slot), filled)


def _blocks(stored: _Stored, query_position: Tensor, kv_heads: int, wide: torch.dtype) -> Iterator[_Block]:
    position, until, lasting = stored.position, stored.until, stored.lasting
    slots = torch.arange(lasting, device=position.device)
    asked = query_position.repeat_interleave(kv_heads, 0)[stored.order]
    for start in range(0, asked.shape[1], BLOCK):
        time = asked[:, start : start + BLOCK]
        first, last = time.amin(1, keepdim=True), time.amax(1, keepdim=True)
        everywhere = (position <= first) & (last < until)
        parts = []
        prefix = torch.zeros_like(first)
        for rows, size in _groups(everywhere[:, :lasting].sum(1).tolist(), fewest=True):
            parts.append(_Part(rows, size, None))
            prefix[rows] = size
        everywhere[:, :lasting] &= slots < prefix  # a head's few tokens beyond its group's prefix go to the edge
        somewhere = (position <= last) & (first < until) & ~everywhere
        for rows, slot, filled in _pack(everywhere[:, lasting:]):
            mask = None if filled is None else torch.where(filled, 0.0, HIDDEN).to(wide)[:, None, None]
            parts.append(_Part(rows, stored.tokens(rows, slot + lasting, filled), mask))
        for rows, slot, filled in _pack(somewhere):
            own, ends = (x[rows].gather(1, slot)[:, None].long() - first[rows, None] for x in (position, until))
            if filled is not None:
                own = own.masked_fill(~filled[:, None], NEVER)
            asks = (time[rows] - first[rows])[..., None].to(wide)
            # 0 where own <= asks < ends: arithmetic on a [i, n] plane is many times faster than torch.where
            mask = (own.to(wide) - asks).clamp_(0, 1)
            if position.shape[1] > lasting:
                mask += (asks + 1 - ends.to(wide)).clamp_(0, 1)
            parts.append(_Part(rows, stored.tokens(rows, slot, filled), mask.mul_(HIDDEN)[:, None]))
        yield _Block(start, min(start + BLOCK, asked.shape[1]), parts)


class _Block(NamedTuple):
    """Queries start:stop and the parts that they see."""

    start: int
    stop: int
    parts: list[_Part]


def _groups(counts: list[int], fewest: bool = False) -> Iterator[tuple[slice, int]]:
    """Runs of rows with about as many keys, and the largest (or smallest) count of the run, where it is not 0."""
    begin = 0
    while begin < len(counts):
        end, least, most = begin + 1, counts[begin], counts[begin]
        while end < len(counts) and max(most, counts[end]) * 0.95 - 64 <= min(least, counts[end]):
            least, most = min(least, counts[end]), max(most, counts[end])
            end += 1
        size = least if fewest else most
        if size > 0:
            yield slice(begin, end), size
        begin = end


def _pack(alive: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Runs of rows with about as many alive slots: rows, their slots [R, n], and which of those are filled."""
    counts = alive.sum(1)
    for rows, size in _groups(counts.tolist()):
        slot = alive[rows].nonzero()[:, 1]
        if slot.numel() == size * (rows.stop - rows.start):
            yield rows, slot.view(-1, size), None
        else:
            filled = torch.arange(size, device=alive.device) < counts[rows, None]
            yield rows, torch.zeros_like(filled, dtype=torch.int64).masked_scatter_(filled, slot), filled


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [R, G, i, D], k and v [R, G, n, D] -> out [R, G, i, D] and lse [R, G, i]."""
    if q.device.type == "cpu":
        result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
        return result
    logits = _logits(q, k, mask, scale)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v, lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients; `out` and `lse` are those of all parts together."""
    if q.device.type == "cpu":
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        return grads
    weight = (_logits(q, k, mask, scale) - lse[..., None]).exp()
    change = scale * weight * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return change @ k, change.mT @ q, weight.mT @ grad


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = scale * (q @ k.mT)
    return logits if mask is None else logits + mask


class _Operands:
    """q, k, v in the arithmetic's dtype; a bias is one more column of q and k, so that SDPA also gives its gradient."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, logit_bias: Tensor | None, scale: float, stored: _Stored
    ) -> None:
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.kv_heads, self.dim = k.shape[2:]
        self.group = q.shape[2] // self.kv_heads
        self.order, self.place = stored.order, stored.order.argsort()
        # with a bias the scale goes into q, so that its column needs no division; dq is then to be scaled
        self.scale, self.rescale = (scale, 1.0) if logit_bias is None else (1.0, scale)
        q, k, v = (x.to(self.wide) for x in (q, k, v))
        if logit_bias is not None:
            q = torch.cat([scale * q, torch.ones_like(q[..., :1])], -1)
            k = torch.cat([k, logit_bias.to(self.wide)[..., None]], -1)
            v = pad(v, [0, 1])
        self.q, self.width = q, q.shape[-1]
        self.flat = [x.reshape(-1, self.width) for x in (k, v)]
        everything = slice(None), slice(stored.lasting)
        self.lasting_tokens = _Tokens(stored.token[everything], stored.position[everything] < NEVER)
        self.lasting = self._keys(self.lasting_tokens)

    def _keys(self, tokens: _Tokens) -> list[Tensor]:
        """k and v of tokens, as [R, 1, n, D]; zero where none counts, for what is not stored may be anything."""
        shape = *tokens.flat.shape, self.width
        keys = [x.index_select(0, tokens.flat.flatten()).view(shape) for x in self.flat]
        if tokens.filled is not None:
            hole = (~tokens.filled).nonzero(as_tuple=True)
            keys = [x.index_put_(hole, x.new_zeros(())) for x in keys]
        return [x[:, None] for x in keys]

    def queries(self, x: Tensor, block: _Block) -> Tensor:
        """The block's queries of [B, T, H, ...] as rows [B * Hkv, G, i, ...]."""
        x = x[:, block.start : block.stop].unflatten(2, (self.kv_heads, self.group)).movedim(1, 3)
        return x[self.order // self.kv_heads, self.order % self.kv_heads]

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse: [B * Hkv, G, i, ...] -> [B, i, H, ...]."""
        y: Tensor = x[self.place].unflatten(0, (-1, self.kv_heads)).movedim(3, 1).flatten(2, 3)
        return y

    def gather(self, part: _Part) -> tuple[Tensor, Tensor]:
        """k and v of a part, [R, G, n, D]."""
        if isinstance(part.source, _Tokens):
            k, v = self._keys(part.source)
        else:
            k, v = (x[part.rows, :, : part.source] for x in self.lasting)
        return k.expand(-1, self.group, -1, -1), v.expand(-1, self.group, -1, -1)


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


def _forward(call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    stored = _Stored(call.key_position, call.evict_at)
    operands = _Operands(call.q, call.k, call.v, call.logit_bias, scale, stored)
    out, lse = _empty(call.q)
    for block in _blocks(stored, call.query_position, operands.kv_heads, operands.wide):
        asked = operands.queries(operands.q, block)
        have = torch.zeros_like(asked)
        have_lse = torch.full_like(have[..., 0], 2 * HIDDEN)
        for part in block.parts:
            more, more_lse = _attend(asked[part.rows], *operands.gather(part), part.mask, operands.scale)
            old_lse = have_lse[part.rows]
            total = torch.logaddexp(old_lse, more_lse)
            have[part.rows].mul_((old_lse - total).exp_()[..., None])
            have[part.rows].addcmul_(more, (more_lse - total).exp_()[..., None])
            have_lse[part.rows] = total
        blind = have_lse < HIDDEN / 2
        have.masked_fill_(blind[..., None], 0)
        out[:, block.start : block.stop] = operands.tokens(have)[..., : operands.dim]
        lse[:, block.start : block.stop] = operands.tokens(have_lse.masked_fill_(blind, float("-inf")))
    return out, lse


def _backward(
    grad: Tensor, call: _Call, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias (empty without one)."""
    q, k, _, _, logit_bias, *_ = call
    stored = _Stored(call.key_position, call.evict_at)
    operands = _Operands(call.q, call.k, call.v, logit_bias, scale, stored)
    bias_column = [0, operands.width - operands.dim]
    dq = torch.empty_like(q)
    flat, lasting = ([torch.zeros_like(x) for x in xs] for xs in (operands.flat, operands.lasting))
    for block in _blocks(stored, call.query_position, operands.kv_heads, operands.wide):
        asked = operands.queries(operands.q, block)
        grad_read, read = (pad(operands.queries(x, block).to(operands.wide), bias_column) for x in (grad, out))
        # a query that sees nothing meets only hidden logits: exp(HIDDEN - 0) = 0
        read_lse = operands.queries(lse, block).clamp(min=HIDDEN / 2)
        change = torch.zeros_like(asked)
        for part in block.parts:
            own = part.rows
            more_q, *more = _attend_backward(
                grad_read[own], asked[own], *operands.gather(part), read[own], read_lse[own], part.mask, operands.scale
            )
            change[own] += more_q
            for whole, kept, share in zip(flat, lasting, more, strict=True):
                share = share.sum(1, keepdim=True)
                if isinstance(part.source, _Tokens):
                    _add_keys(whole, part.source, share)
                else:
                    kept[part.rows, :, : part.source] += share
        dq[:, block.start : block.stop] = operands.rescale * operands.tokens(change)[..., : operands.dim]
    for whole, kept in zip(flat, lasting, strict=True):
        _add_keys(whole, operands.lasting_tokens, kept)
    dk, dv = (x.view(*k.shape[:3], operands.width) for x in flat)
    dbias = grad.new_empty(0) if logit_bias is None else dk[..., operands.dim].to(logit_bias.dtype, copy=True)
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
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:3], dtype=wide)


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
                grads, _backward(grad[:, own], call.of(own), out[:, own], lse[:, own], scale), strict=True
            ):
                if whole.numel():
                    whole[:, own] = part
        return grads


@gather_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, logit_bias: Tensor | None, *_rest: Any
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
