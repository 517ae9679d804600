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
import math
from collections.abc import Iterator, Sequence
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
        time: int32 `[N, T]`.
    """

    q: Tensor
    time: Tensor


class _Part(NamedTuple):
    """U pages for one call of SDPA: those of a slab as they lie, or copies.

    Attributes:
        slab: the index of the slab.
        source: the slab itself.
        pages: the pages.
        k: `[U, W, page, D]`, their keys.
        v: `[U, W, page, D]`, their values.
        copied: whether they are copies.
        owner: int64 `[U]`, the stream that lists each page. A page that no stream lists may have
            any: what it gives is not merged.
    """

    slab: int
    source: Pages
    pages: Pages
    k: Tensor
    v: Tensor
    copied: bool
    owner: Tensor

    @classmethod
    def of(cls, slab: int, source: Pages, pages: Pages, owner: Tensor, *, copied: bool) -> _Part:
        """A part of these pages."""
        k, v = pages.k, pages.v
        if k.shape[1:3] != (1, 1):
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return cls(slab, source, pages, k, v, copied, owner)


class _Group:
    """Parts whose pages have one size.

    Attributes:
        parts: the parts.
        owner: int64 `[U]`, the owners of all their pages.
        in_order: whether page u belongs to stream u, for all streams.
        sequence: int64 `[U]`, the sequence of each page.
        open: `[U, 1, 1, page]`, zeros: the mask where every slot is visible.
    """

    def __init__(self, parts: list[_Part], streams: int, heads: int, *, look: bool) -> None:
        self.parts = parts
        self.owner = _joined([part.owner for part in parts])
        self.in_order = (
            look and len(self.owner) == streams and torch.equal(self.owner, _count(self.owner))
        )
        self.sequence = self.owner if heads == 1 else self.owner // heads
        self.open: Tensor | None = None

    def opened(self, dtype: torch.dtype) -> Tensor:
        """The mask where every slot is visible."""
        if self.open is None or self.open.dtype != dtype:
            shape = len(self.owner), 1, 1, self.parts[0].k.shape[2]
            self.open = torch.zeros(shape, dtype=dtype, device=self.owner.device)
        return self.open


class _Plan:
    """What is to be read.

    Attributes:
        groups: ordered by the size of their pages.
        which: int64 `[R, M']`: for each entry of a page table the number of its page among the
            pages of all parts, counted from 1; 0 for no page. At least one entry of a stream is 0,
            so that a stream without pages has something to merge.
        entry: int64 `[R * M']`, `which` flat.
        kept: whether later calls with the same page table may use it: no page was copied.
        none: unit 0, the result of no page.
    """

    def __init__(self, parts: list[_Part], which: Tensor, heads: int, *, look: bool) -> None:
        self.groups = [
            _Group(list(alike), len(which), heads, look=look)
            for _, alike in itertools.groupby(parts, lambda part: part.pages.k.shape[1])
        ]
        self.which, self.entry = which, which.flatten()
        self.kept = look and not any(part.copied for part in parts)
        self.none: tuple[Tensor, Tensor] | None = None

    def nothing(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse of no page, for queries `[R, W, G * T, D]`."""
        known = self.none
        if known is None or known[0].shape[1:] != q.shape[1:] or known[0].dtype != q.dtype:
            out = q.new_zeros(1, *q.shape[1:])
            known = self.none = out, torch.full_like(out[..., 0], float("-inf"))
        return known

    def renew(self, slabs: Sequence[Pages]) -> None:
        """Takes the keys and values of other slabs of the same sizes."""
        for group in self.groups:
            group.parts = [
                part
                if part.source is slabs[part.slab]
                else _lying(part.slab, slabs[part.slab], part.owner)
                for part in group.parts
            ]


def run(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns out `[N, T, Hq, D]` and lse `[N, T, Hq]`, unrounded."""
    look = values_are_checked(call.q)
    queries, plan = _queries(call), _planned(call, look=look)
    out, lse = _read(queries, plan, call.scale, clean=not look)
    # A slot that no query sees may hold anything, and 0 * inf is NaN. Looking is cheaper than
    # zeroing it every time. The sum is not finite if an entry is not; one that only overflows costs
    # a second read.
    if look and not math.isfinite(out.sum().item()):
        out, lse = _read(queries, plan, call.scale, clean=True)
    if call.q.shape[1] == 1:
        return out.view(call.q.shape), lse.view(call.q.shape[:3])
    return _by_sequence(out, call), _by_sequence(lse[..., None], call)[..., 0]


def _queries(call: PagedCall) -> _Queries:
    """The queries of a call by stream.

    Those of a group go one behind the other, as more queries of one head.
    """
    heads, together = call.block_table.shape[1], call.slabs[0].k.shape[2]
    group = call.q.shape[2] // (heads * together)
    q = call.q.to(wide(call.q))
    if call.q.shape[1] == 1:
        q = q.reshape(len(q) * heads, together, group, q.shape[3])
    else:
        q = q.unflatten(2, (heads, together, group))
        q = q.permute(0, 2, 3, 4, 1, 5).flatten(3, 4).flatten(0, 1)
    return _Queries(q, call.query_position)


def _by_sequence(x: Tensor, call: PagedCall) -> Tensor:
    """`[N * H, W, G * T, D]` -> `[N, T, Hq, D]`."""
    heads, together = call.block_table.shape[1], x.shape[1]
    queries, group = call.q.shape[1], call.q.shape[2] // (heads * together)
    x = x.reshape(len(call.q), heads, together, group, queries, x.shape[3])
    return x.permute(0, 4, 1, 2, 3, 5).flatten(2, 4)


def _planned(call: PagedCall, *, look: bool) -> _Plan:
    """The plan that the memo of a call holds, or a new one."""
    if call.memo is None or not look or call.shared is not False or call.q.numel() == 0:
        return _plan(call, look=look)
    plan: _Plan | None = call.memo.plan
    if plan is None:
        with torch.inference_mode(False), torch.no_grad():
            plan = _plan(call, look=look)
        if plan.kept:
            call.memo.plan = plan
    else:
        plan.renew(call.slabs)
    return plan


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
    numbered = zip(itertools.count(), call.slabs, ends, lasts, strict=False)
    for index, slab, end, last in sorted(numbered, key=lambda one: one[1].k.shape[1]):
        begin = end - len(slab.k)
        size = last - begin
        if size == 0 or slab.k.numel() == 0 or table.numel() == 0 or call.q.numel() == 0:
            continue
        shared = call.shared if often is None else bool(often[begin:end].any())
        if shared or size > MAX_PAGES_PER_ENTRY * table.numel():
            inside = ((table >= begin) & (table < end)).flatten()
            part, entry = _gathered(
                index,
                slab,
                (table - begin).flatten(),
                inside,
                stream,
                look=call.shared is not False,
            )
            copies.append(
                (
                    inside,
                    torch.zeros_like(page).flatten().index_copy_(0, entry, units + _count(entry)),
                )
            )
        else:
            part = _lying(index, slab, owner[begin:last])
            place[begin:last] = units + _count(part.owner)
        parts.append(part)
        units += len(part.owner)
    which = place[page.flatten()]
    for inside, unit in copies:
        which = torch.where(inside, unit, which)
    return _Plan(parts, pad(which.view_as(table), [0, 1]), call.block_table.shape[1], look=look)


def _count(x: Tensor) -> Tensor:
    """0, 1, ..., len(x) - 1, int64."""
    return torch.arange(len(x), device=x.device)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _lying(index: int, slab: Pages, owner: Tensor) -> _Part:
    """The first pages of a slab where they lie, as many as `owner` has entries."""
    if len(owner) == len(slab.k):
        return _Part.of(index, slab, slab, owner, copied=False)
    k, v, position, evict_at, bias = (None if x is None else x[: len(owner)] for x in slab)
    pages = Pages(k, v, position, evict_at, bias)  # type: ignore[arg-type]
    return _Part.of(index, slab, pages, owner, copied=False)


def _gathered(
    index: int, slab: Pages, place: Tensor, inside: Tensor, stream: Tensor, *, look: bool
) -> tuple[_Part, Tensor]:
    """Copies of the pages that the entries `inside` list, and the numbers of these entries.

    Without a look at values the shape may not depend on them: the other entries then get a copy of
    page 0, unused.
    """
    entry = inside.nonzero()[:, 0] if look else _count(inside)
    which = torch.where(inside, place, 0)[entry]
    k, v, position, evict_at, bias = (None if x is None else x.index_select(0, which) for x in slab)
    copies = Pages(k, v, position, evict_at, bias)  # type: ignore[arg-type]
    return _Part.of(index, slab, copies, stream.flatten()[entry], copied=True), entry


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
    results = [plan.nothing(queries.q)]
    for group in plan.groups:
        first = group.parts[0].pages
        if queries.time.shape[1] == 1 and first.k.shape[1] == 1 and first.logit_bias is None:
            results.append(_attend_single(queries, group, scale))
        else:
            results += _attend(queries, group, scale, clean=clean)
    out, lse = (torch.cat(x) for x in zip(*results, strict=True))
    # `index_select` copies whole entries, which indexing by `which` does not
    out = out.index_select(0, plan.entry).unflatten(0, plan.which.shape)
    return merge_all(out, lse[plan.which])


def _hidden(queries: _Queries, group: _Group) -> Tensor:
    """Which slots the one query of each page's owner does not see, bool `[U, page]`."""
    position = _joined([part.pages.position for part in group.parts])
    evict_at = _joined([part.pages.evict_at for part in group.parts])
    time = queries.time.index_select(0, group.sequence)
    return (evict_at <= time) | (position > time)


def _owned(queries: _Queries, group: _Group) -> Tensor:
    """The queries of the owner of each page."""
    return queries.q if group.in_order else queries.q.index_select(0, group.owner)


def _attend_single(queries: _Queries, group: _Group, scale: float) -> tuple[Tensor, Tensor]:
    """As `_attend`, for one query and pages of one key: its value is what is read."""
    dtype = queries.q.dtype
    k = _joined([part.k for part in group.parts]).to(dtype)
    v = _joined([part.v for part in group.parts]).to(dtype)
    q, hidden = _owned(queries, group), _hidden(queries, group)[..., None]
    lse = (q * k).sum(-1) * scale
    out = v.masked_fill(hidden[..., None], 0)
    out = out if out.shape == q.shape else out.expand(q.shape)
    return out, lse.masked_fill_(hidden, float("-inf"))


def _attend(
    queries: _Queries, group: _Group, scale: float, *, clean: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Out `[U, W, G * T, D]` and lse `[U, W, G * T]` of every part; 0 and -inf for no key.

    Everything but keys and values is small, so it is computed for all parts at once.
    """
    parts, dtype, times = group.parts, queries.q.dtype, queries.time.shape[1]
    if parts[0].pages.logit_bias is None and times == 1:
        hidden = _hidden(queries, group).view(len(group.owner), 1, 1, parts[0].k.shape[2])
        mask = group.opened(dtype).masked_fill(hidden, float("-inf"))
        blind = hidden.all(3)
    else:
        mask = _masked(queries, group)[:, None]
        hidden = mask == float("-inf")
        blind = hidden.all(3)
    q = _owned(queries, group)
    # the queries of a group stand one behind the other; of one query, SDPA repeats the mask itself
    if times > 1:
        repeats = q.shape[2] // times
        mask, blind = mask.repeat(1, 1, repeats, 1), blind.repeat(1, 1, repeats)
    sizes = [len(part.owner) for part in parts]
    for part, q_own, mask_own, unread, unseen in zip(
        parts,
        *((x,) if len(parts) == 1 else x.split(sizes) for x in (q, mask, blind)),
        hidden.all(2)[..., None].split(sizes) if clean else sizes,  # [U, 1, page, 1]
        strict=True,
    ):
        k, v = part.k, part.v
        if isinstance(unseen, Tensor):
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        out, lse = attend(q_own, k.to(dtype), v.to(dtype), mask_own, scale)
        # Only on a CPU SDPA gives 0 to a query that sees nothing. NaN would be noticed by `run`.
        if clean:
            out = out.masked_fill_(unread[..., None], 0)
        yield out, lse.masked_fill_(unread, float("-inf"))


def _masked(queries: _Queries, group: _Group) -> Tensor:
    """What is added to logits, `[U, T, page]`."""
    position, evict_at, bias = (
        None if x[0] is None else _joined(x)
        for x in zip(*(part.pages[2:] for part in group.parts), strict=True)
    )
    assert position is not None
    assert evict_at is not None
    time, dtype = queries.time.index_select(0, group.sequence)[:, :, None], queries.q.dtype
    visible = (position[:, None] <= time) & (time < evict_at[:, None])
    added = torch.zeros((), dtype=dtype, device=position.device) if bias is None else bias[:, None]
    return torch.where(visible, added.to(dtype), float("-inf"))
