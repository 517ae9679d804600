"""Attention to pages where they lie: each page on its own, then a merge for each stream.

The queries of a page are those of the stream that lists it. So all pages of a slab, also those that
no stream lists, are one batch of small attentions over k and v as they lie in memory: no key is
copied. No step depends on the value of a tensor, as a CUDA graph needs it, unless values are looked
at (on a CPU) or `shared` is None.

Where several streams list the same page, the listed pages are gathered, once for each entry of the
page tables. The log-sum-exp of a page is its weight when a stream merges its pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.arguments import values_are_checked
from hamblocks_ops.paged_attention.layout import PagedCall, Pages, users
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.merge import merge_all
from hamblocks_ops.selected_attention.sdpa import attend

MAX_PAGES_PER_ENTRY = 3
"""Most pages of a slab, for each entry of the page tables, with which the slab is read in place. In
a larger slab most pages are listed by no stream, so the listed pages are copied and the copies
read."""


class _Queries(NamedTuple):
    """The queries of R = N * H streams.

    Attributes:
        q: `[R, W, G * T, D]`, float32 or float64.
        time: int32 `[R, T]`.
    """

    q: Tensor
    time: Tensor


class _Part(NamedTuple):
    """U pages for one call of SDPA: those of a slab as they lie, or copies.

    Attributes:
        pages: the pages.
        owner: int64 `[U]`, the stream that lists each page. A page that no stream lists may have
            any: what it gives is not merged.
    """

    pages: Pages
    owner: Tensor


class _Plan(NamedTuple):
    """What is to be read.

    Attributes:
        parts: ordered by the size of their pages.
        which: int64 `[R, M + 1]`: for each entry of a page table the number of its page among the
            pages of all parts, counted from 1; 0 for no page. The last column is 0, so that a
            stream without pages has something to merge.
    """

    parts: list[_Part]
    which: Tensor


def run(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns out `[N, T, Hq, D]` and lse `[N, T, Hq]`, unrounded."""
    look = values_are_checked(call.q)
    queries, plan = _queries(call), _plan(call, look=look)
    out, lse = _read(queries, plan, call.scale, clean=not look)
    # a slot that no query sees may hold anything, and 0 * inf is NaN. Looking is cheaper than
    # zeroing it every time.
    if look and not bool(out.isfinite().all()):
        out, lse = _read(queries, plan, call.scale, clean=True)
    return _by_sequence(out, call), _by_sequence(lse[..., None], call)[..., 0]


def _queries(call: PagedCall) -> _Queries:
    """The queries of a call by stream.

    Those of a group go one behind the other, as more queries of one head.
    """
    heads, together = call.block_table.shape[1], call.slabs[0].k.shape[2]
    q = call.q.to(wide(call.q)).unflatten(
        2, (heads, together, call.q.shape[2] // (heads * together))
    )
    q = q.permute(0, 2, 3, 4, 1, 5).flatten(3, 4).flatten(0, 1)
    return _Queries(q, call.query_position.repeat_interleave(heads, 0))


def _by_sequence(x: Tensor, call: PagedCall) -> Tensor:
    """`[N * H, W, G * T, D]` -> `[N, T, Hq, D]`."""
    heads, together = call.block_table.shape[1], x.shape[1]
    queries, group = call.q.shape[1], call.q.shape[2] // (heads * together)
    x = x.reshape(len(call.q), heads, together, group, queries, x.shape[3])
    return x.permute(0, 4, 1, 2, 3, 5).flatten(2, 4)


def _plan(call: PagedCall, *, look: bool) -> _Plan:
    """A slab is read in place where each page has one stream at most.

    Otherwise its listed pages are gathered.
    """
    table = call.block_table.flatten(0, 1).long()
    ends = list(itertools.accumulate(len(slab.k) for slab in call.slabs))
    count = ends[-1]
    page = torch.where(table < 0, count, table)
    stream = torch.arange(len(table), device=table.device)[:, None].expand_as(table)
    # the stream of every page; the page numbered `count` stands for entries without a page
    owner = torch.zeros(count + 1, dtype=torch.int64, device=table.device)
    owner.scatter_(0, page.flatten(), stream.flatten())
    often = users(table, count) > 1 if call.shared is None else None
    lasts = _last_listed(table, ends) if look else ends
    # `place` is where a page that is read in place stands among all units, `copies` the same for
    # entries with a copy
    place, copies, parts, units = torch.zeros_like(owner), [], [], 1
    for slab, end, last in sorted(
        zip(call.slabs, ends, lasts, strict=True), key=lambda one: one[0].k.shape[1]
    ):
        begin = end - len(slab.k)
        size = last - begin
        if size == 0 or slab.k.numel() == 0 or table.numel() == 0 or call.q.numel() == 0:
            continue
        shared = call.shared if often is None else bool(often[begin:end].any())
        if shared or size > MAX_PAGES_PER_ENTRY * table.numel():
            inside = ((table >= begin) & (table < end)).flatten()
            part, entry = _gathered(
                slab, (table - begin).flatten(), inside, stream, look=call.shared is not False
            )
            copies.append(
                (
                    inside,
                    torch.zeros_like(page).flatten().index_copy_(0, entry, units + _count(entry)),
                )
            )
        else:
            part = _lying(slab, owner[begin:last])
            place[begin:last] = units + _count(part.owner)
        parts.append(part)
        units += len(part.owner)
    which = place[page.flatten()]
    for inside, unit in copies:
        which = torch.where(inside, unit, which)
    return _Plan(parts, pad(which.view_as(table), [0, 1]))


def _count(x: Tensor) -> Tensor:
    """0, 1, ..., len(x) - 1, int64."""
    return torch.arange(len(x), device=x.device)


def _lying(slab: Pages, owner: Tensor) -> _Part:
    """The first pages of a slab where they lie, as many as `owner` has entries."""
    k, v, position, evict_at, bias = (None if x is None else x[: len(owner)] for x in slab)
    return _Part(Pages(k, v, position, evict_at, bias), owner)  # type: ignore[arg-type]


def _gathered(
    slab: Pages, place: Tensor, inside: Tensor, stream: Tensor, *, look: bool
) -> tuple[_Part, Tensor]:
    """Copies of the pages that the entries `inside` list, and the numbers of these entries.

    Without a look at values the shape may not depend on them: the other entries then get a copy of
    page 0, unused.
    """
    entry = inside.nonzero()[:, 0] if look else _count(inside)
    which = torch.where(inside, place, 0)[entry]
    k, v, position, evict_at, bias = (None if x is None else x.index_select(0, which) for x in slab)
    copies = Pages(k, v, position, evict_at, bias)  # type: ignore[arg-type]
    return _Part(copies, stream.flatten()[entry]), entry


def _last_listed(table: Tensor, ends: list[int]) -> list[int]:
    """The end of the listed pages of every slab.

    A pool fills from below, so the pages behind it are free.
    """
    slab = torch.bucketize(table, torch.tensor(ends, device=table.device), right=True).flatten()
    begins = torch.tensor([0, *ends[:-1]], device=table.device)
    last: list[int] = begins.scatter_reduce(0, slab, table.flatten() + 1, "amax").tolist()
    return last


def _read(queries: _Queries, plan: _Plan, scale: float, *, clean: bool) -> tuple[Tensor, Tensor]:
    """Out `[R, W, G * T, D]` and lse `[R, W, G * T]`.

    With `clean`, slots that no query sees are read as zeros.
    """
    # unit 0: the result of no page
    none = queries.q.new_zeros(1, *queries.q.shape[1:])
    results = [(none, torch.full_like(none[..., 0], float("-inf")))]
    for _, alike in itertools.groupby(plan.parts, lambda part: part.pages.k.shape[1]):
        results += _attend(queries, list(alike), scale, clean=clean)
    which = plan.which.flatten()
    out, lse = (
        torch.cat(x).index_select(0, which).unflatten(0, plan.which.shape)
        for x in zip(*results, strict=True)
    )
    return merge_all(out, lse)


def _attend(
    queries: _Queries, parts: list[_Part], scale: float, *, clean: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Out `[U, W, G * T, D]` and lse `[U, W, G * T]` of every part; 0 and -inf for no key.

    The pages of all parts are of one size. Everything but keys and values is small, so it is
    computed for all parts at once.
    """
    owner, position, evict_at, bias = (
        None if x[0] is None else x[0] if len(x) == 1 else torch.cat(x)
        for x in zip(*((part.owner, *part.pages[2:]) for part in parts), strict=True)
    )
    assert owner is not None
    assert position is not None
    assert evict_at is not None
    time, dtype = queries.time[owner][:, :, None], queries.q.dtype
    visible = (position[:, None] <= time) & (time < evict_at[:, None])  # [U, T, page]
    if bias is None:
        mask = torch.where(
            visible, torch.zeros((), dtype=dtype, device=owner.device), float("-inf")
        )
    else:
        visible &= (bias != float("-inf"))[:, None]
        mask = torch.where(visible, bias[:, None].to(dtype), float("-inf"))
    q, blind = queries.q.index_select(0, owner), ~visible.any(2)
    # the queries of a group stand one behind the other; of one query, SDPA repeats the mask itself
    if time.shape[1] > 1:
        group = q.shape[2] // time.shape[1]
        mask, blind = mask.repeat(1, group, 1), blind.repeat(1, group)
    begin = 0
    for part in parts:
        own = slice(begin, begin + len(part.owner))
        begin = own.stop
        k, v = part.pages[:2]
        if clean:
            unseen = ~visible[own].any(1)[:, :, None, None]
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
        out, lse = attend(q[own], k, v, mask[own, None], scale)
        hidden = blind[own, None]
        yield out.masked_fill_(hidden[..., None], 0), lse.masked_fill_(hidden, float("-inf"))
