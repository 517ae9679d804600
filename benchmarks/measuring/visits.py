"""Tiles that the Triton kernels of selected attention visit, counted from lifetimes.

The kernels walk lists and plans (`selected_attention/triton/listing.py` and `plan.py`). Here torch
works out the same from lifetimes alone, on any device and at any size. A test compares it with the
plans themselves.

Letters: B batch rows, T tokens, R = B * Hkv streams, M blocks of queries, N blocks of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.packing import NEVER

CLASSES, LAST, SHORT = 16, 15, 64
"""Classes of a list, the class of tokens that no query sees, and the lifetime from which on each
doubling is a class, as in `listing.py`."""
Configs = tuple[Any, Any, Any]
"""Launches of forward, gradient of q, and gradients of k and v, as in `sizes.py`."""


class Visits(NamedTuple):
    """What the programs of one kernel visit, in the order in which they are launched.

    Attributes:
        whole: int64 `[programs]`, tiles that take no mask.
        masked: int64 `[programs]`, tiles that take one.
    """

    whole: Tensor
    masked: Tensor

    @property
    def tiles(self) -> int:
        """All of them."""
        return int(self.whole.sum() + self.masked.sum())


class Lists(NamedTuple):
    """The stored keys of every stream, in the order of their list.

    Attributes:
        begins: int32 `[R, slots]`, the position of a key; NEVER where no query sees a key.
        ends: int32 `[R, slots]`, its evict_at; -1 where no query sees a key.
        first: int64 `[R, CLASSES]`, the first slot of every class.
        counts: int64 `[R, CLASSES]`, its keys.
    """

    begins: Tensor
    ends: Tensor
    first: Tensor
    counts: Tensor


class Extremes(NamedTuple):
    """Least and most position and evict_at of every block of keys, int32 `[R, N]` each."""

    begins: Tensor
    begun: Tensor
    ended: Tensor
    ends: Tensor


def visits(
    evict_at: Tensor, configs: Configs, *, group: int, keep: bool, until: Tensor | None = None
) -> list[Visits]:
    """Visits of the forward kernel and, with `keep`, of the two backward kernels.

    Args:
        evict_at: int32 `[B, T, Hkv]`, counted over the whole batch row.
        configs: the launches.
        group: query heads for each key head.
        keep: whether there will be a backward pass.
        until: int32 `[B, T, 1]`, the end of the sequence of each token; None: T.
    """
    tokens = evict_at.shape[1]
    lists = listed(evict_at, configs if keep else configs[:1], until)
    found = []
    for config in configs[: 2 if keep else 1]:
        low, high = asked(tokens, config.queries, evict_at.device)
        whole, masked = of_queries(lists, low, high, config.keys)
        # late queries first, the query heads of a group one behind the other
        own = (x.flip(1).repeat_interleave(group, 0).flatten() for x in (whole, masked))
        found.append(Visits(*own))
    if keep:
        low, high = asked(tokens, configs[2].queries, evict_at.device)
        whole, masked = of_keys(lists, low, high, configs[2].keys)
        # the first blocks of all lists first
        found.append(Visits(*(group * x.T.flatten() for x in (whole, masked))))
    return found


def seen(evict_at: Tensor) -> tuple[int, int]:
    """Numbers of (query, key, head) that see each other and of (key, head) that are stored."""
    tokens = evict_at.shape[1]
    position = torch.arange(tokens, device=evict_at.device)[None, :, None]
    lifetimes = (evict_at.expand(1, tokens, -1).long().clamp(max=tokens) - position).clamp(min=0)
    return int(lifetimes.sum()), int((lifetimes > 0).sum())


def listed(evict_at: Tensor, configs: tuple[Any, ...], until: Tensor | None) -> Lists:
    """The lists that serve the kernels of these launches."""
    batch, tokens, heads = evict_at.shape
    position = torch.arange(tokens, device=evict_at.device, dtype=torch.int32)
    begins = position.expand(batch, heads, tokens).flatten(0, 1)
    ends = evict_at.transpose(1, 2).flatten(0, 1)
    end = torch.full_like(ends, tokens)
    if until is not None:
        end = until.expand(batch, tokens, heads).transpose(1, 2).flatten(0, 1)
        ends = torch.minimum(ends, end)
    lifetime = (ends.long() - begins).contiguous()
    longer = SHORT << torch.arange(LAST - 2, device=lifetime.device)
    kind = 1 + torch.bucketize(lifetime, longer, right=True)
    kind = torch.where(ends >= end, 0, kind).masked_fill(lifetime <= 0, LAST)
    stream = torch.arange(batch * heads, device=kind.device)[:, None]
    count = (kind + CLASSES * stream).flatten().bincount(minlength=CLASSES * batch * heads)
    count = count.unflatten(0, (-1, CLASSES))
    align = max(one.keys for one in configs)
    gap = -count[:, :1] % align
    first = count.cumsum(1) - count + torch.cat([0 * gap, gap.expand(-1, CLASSES - 1)], 1)
    # a token's slot: the first of its class, and how many of the class come before it
    order = kind.argsort(dim=1, stable=True)
    ranks = torch.arange(tokens, device=kind.device).expand_as(order)
    slot = torch.empty_like(order).scatter_(1, order, ranks)
    slot = slot + (first - count.cumsum(1) + count).gather(1, kind)
    slots = -(-tokens // align) * align + align
    seen = kind < LAST
    empty = begins.new_full((batch * heads, slots), NEVER)
    return Lists(
        empty.scatter(1, slot, begins.masked_fill(~seen, NEVER)),
        torch.full_like(empty, -1).scatter(1, slot, ends.to(torch.int32).masked_fill(~seen, -1)),
        first,
        count,
    )


def asked(tokens: int, block: int, device: Any) -> tuple[Tensor, Tensor]:
    """The earliest and the latest query of every block of queries, int32 `[M]` each."""
    low = torch.arange(0, tokens, block, device=device, dtype=torch.int32)
    return low, (low + block - 1).clamp(max=tokens - 1)


def extremes(lists: Lists, block: int) -> Extremes:
    """Extremes of blocks of this many keys."""
    begins, ends = (x.unflatten(1, (-1, block)) for x in lists[:2])
    ended = ends.masked_fill(begins == NEVER, NEVER).amin(2)
    return Extremes(begins.amin(2), begins.amax(2), ended, ends.amax(2))


def span(visited: Tensor) -> tuple[Tensor, Tensor]:
    """From which to which of the last dimension anything is visited; 0 and 0 if nothing is."""
    some, size = visited.any(-1), visited.shape[-1]
    # argmax of equal values is not always the first on every device, so each is told apart
    number = torch.arange(size, device=visited.device, dtype=torch.int32)
    begin = torch.where(visited, number, size).amin(-1)
    end = torch.where(visited, number + 1, 0).amax(-1)
    return torch.where(some, begin, 0), end


def split(visited: Tensor, early: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last dimension are visited without a mask and with one.

    Those without lie behind the last that is `early` and before the first that is `late`.
    """
    begin, end = span(visited)
    _, after = span(early)
    until, _ = span(late)
    until = torch.where(late.any(-1), until, late.shape[-1])
    full_begin = torch.minimum(torch.maximum(after, begin), end)
    full_end = torch.minimum(torch.maximum(until, full_begin), end)
    whole = full_end - full_begin
    return whole.long(), (end - begin - whole).long()


def of_queries(lists: Lists, low: Tensor, high: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Tiles without and with a mask that each block of queries visits, int64 `[R, M]` each."""
    low, high = low[:, None], high[:, None]
    results = []
    # a stream at a time: [M, N] of all of them may not fit
    for begins, begun, ended, ends, first, count in zip(
        *extremes(lists, block), lists.first.tolist(), lists.counts.tolist(), strict=True
    ):
        visited = (begins <= high) & (ends > low)
        own = -(-count[0] // block)
        parts = [x[:, :own] for x in (visited, ended <= high, begun > low)]
        whole, masked = split(*parts) if own else (torch.zeros_like(low[:, 0]),) * 2
        rest = first[1] // block
        for kind in range(1, LAST):
            if not count[kind]:
                continue
            stop = first[kind] + count[kind]
            alone, shared = stop // block, -(-stop // block)
            for start, end in ((rest, alone), (max(rest, alone), shared)):
                if start < end:
                    reach = span(visited[:, start:end])
                    masked = masked + (reach[1] - reach[0])
            rest = max(rest, shared)
        results.append((whole, masked))
    whole, masked = (torch.stack(x) for x in zip(*results, strict=True))
    return whole, masked


def of_keys(lists: Lists, low: Tensor, high: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Tiles without and with a mask that each block of keys visits, int64 `[R, N]` each."""
    results = [
        split(
            (begins[:, None] <= high) & (ends[:, None] > low),
            begun[:, None] > low,
            ended[:, None] <= high,
        )
        for begins, begun, ended, ends in zip(*extremes(lists, block), strict=True)
    ]
    whole, masked = (torch.stack(x) for x in zip(*results, strict=True))
    return whole, masked
