"""Attention to pages where they lie: every page is read on its own, and a row merges what its pages give.

To a page belong the queries of the row that lists it, so all pages of a slab, even those that nobody lists, are one
batch of small attentions over k and v as they are in memory: no key is copied, and no step depends on a value, as a
CUDA graph needs it. Where a page has several such rows, the listed pages are gathered, once for each of their rows. The
log-sum-exp of a page says how much it counts in its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hamblocks_ops.arguments import values_are_checked
from hamblocks_ops.paged_attention.layout import PagedCall, Pages, total, users
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention.sdpa import attend

SPARE = 3
"""A slab is read in place if it has up to so many pages per entry of the block table: beyond that it is cheaper to copy
pages and read the copies."""


class _Queries(NamedTuple):
    """The queries of each of R rows.

    Attributes:
        q: [R, W, G * T, D], in the arithmetic's dtype.
        time: int32 [R, T].
    """

    q: Tensor
    time: Tensor


class _Part(NamedTuple):
    """U pages for one call of SDPA: a slab, or what was gathered from one.

    Attributes:
        owner: int64 [U], the row of each; any row for a page that none lists, for nobody merges what it gives.
        where: int64 [R, M], which of them an entry of the block table is, -1 for none.
    """

    pages: Pages
    owner: Tensor
    where: Tensor


class _Listed(NamedTuple):
    """The pages of one slab that a block table of R rows lists.

    Attributes:
        row: int64 [R, M].
        place: int64 [R, M], in the slab.
        inside: bool [R, M], which entries list one of its pages.
    """

    slab: Pages
    row: Tensor
    place: Tensor
    inside: Tensor

    def up_to(self, pages: int) -> _Listed:
        """The same of the first pages of the slab."""
        slab = Pages(*(None if x is None else x[:pages] for x in self.slab))  # type: ignore[arg-type]
        return self._replace(slab=slab)

    def lying(self) -> _Part:
        """All pages of the slab, as they are."""
        size = len(self.slab.k)
        # one more page, for entries that list none of these
        owner = torch.zeros(size + 1, dtype=torch.int64, device=self.row.device)
        owner.scatter_(0, torch.where(self.inside, self.place, size).flatten(), self.row.flatten())
        return _Part(self.slab, owner[:-1], torch.where(self.inside, self.place, -1))

    def gathered(self, *, look: bool) -> _Part:
        """Copies of those that are listed; without a look at the table, one for each of its entries."""
        place, inside = self.place.flatten(), self.inside.flatten()
        entry = inside.nonzero()[:, 0] if look else torch.arange(len(inside), device=inside.device)
        where = torch.full_like(place, -1).index_copy_(0, entry, torch.arange(len(entry), device=entry.device))
        place = torch.where(inside, place, 0)[entry]
        copies = Pages(*(None if x is None else x.index_select(0, place) for x in self.slab))  # type: ignore[arg-type]
        return _Part(copies, self.row.flatten()[entry], torch.where(inside, where, -1).view_as(self.row))


def pages(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns out `[N, T, Hq, D]` and lse `[N, T, Hq]`, unrounded."""
    queries, parts = _queries(call), list(_parts(call))
    look = values_are_checked(call.q)
    out, lse = _read(call, queries, parts, clean=not look)
    if look and not bool(out.isfinite().all()):  # what no query sees may be anything, and 0 times infinity is NaN
        out, lse = _read(call, queries, parts, clean=True)
    return _by_sequence(out, call), _by_sequence(lse[..., None], call)[..., 0]


def _queries(call: PagedCall) -> _Queries:
    heads, together = call.block_table.shape[1], call.slabs[0].k.shape[2]
    q = call.q.to(wide(call.q)).unflatten(2, (heads, together, call.q.shape[2] // (heads * together)))
    q = q.permute(0, 2, 3, 4, 1, 5).flatten(3, 4).flatten(0, 1)
    return _Queries(q, call.query_position.repeat_interleave(heads, 0))


def _by_sequence(x: Tensor, call: PagedCall) -> Tensor:
    """[N * H, W, G * T, D] -> [N, T, Hq, D]."""
    heads, together = call.block_table.shape[1], x.shape[1]
    queries, group = call.q.shape[1], call.q.shape[2] // (heads * together)
    x = x.reshape(len(call.q), heads, together, group, queries, x.shape[3])
    return x.permute(0, 4, 1, 2, 3, 5).flatten(2, 4)


def _parts(call: PagedCall) -> Iterator[_Part]:
    """One for every slab: in place where each page has one row at most, else gathered."""
    table = call.block_table.flatten(0, 1).long()
    row = torch.arange(len(table), device=table.device)[:, None].expand_as(table)
    count = users(table, total(call.slabs)) if call.shared is None else None
    look, begin = values_are_checked(call.q), 0
    for slab in call.slabs:
        size, place = len(slab.k), table - begin
        listed = _Listed(slab, row, place, (place >= 0) & (place < size))
        own = slice(begin, begin + size)
        begin += size
        if table.numel() == 0 or slab.k.numel() == 0 or call.q.numel() == 0:
            continue
        if look:  # pools fill from below: what lies behind the last page that is listed is free
            listed = listed.up_to(int(place.masked_fill(~listed.inside, -1).max()) + 1)
            size = len(listed.slab.k)
            if size == 0:
                continue
        shared = call.shared if count is None else bool((count[own] > 1).any())
        if shared or size > SPARE * table.numel():
            yield listed.gathered(look=call.shared is not False)
        else:
            yield listed.lying()


def _read(call: PagedCall, queries: _Queries, parts: list[_Part], *, clean: bool) -> tuple[Tensor, Tensor]:
    """out [R, W, G * T, D] and lse [R, W, G * T]; `clean`: with zeros in place of what no query sees."""
    # page 0 of all parts together stands for none; a row has it at least once, for it may have no other
    begin, which = 1, torch.zeros_like(call.block_table.flatten(0, 1), dtype=torch.int64)
    none = queries.q.new_zeros(1, *queries.q.shape[1:])
    outs, lses = [none], [torch.full_like(none[..., 0], float("-inf"))]
    for alike in _by_page_size(parts):
        out, lse = _attend(queries, alike, call.scale, clean=clean)
        outs.append(out)
        lses.append(lse)
        for part in alike:
            which = torch.where(part.where < 0, which, part.where + begin)
            begin += len(part.owner)
    which = pad(which, [0, 1])
    out, lse = (torch.cat(x).index_select(0, which.flatten()).unflatten(0, which.shape) for x in (outs, lses))
    peak = lse.amax(1, keepdim=True)
    weight = (lse - peak.masked_fill(peak == float("-inf"), 0)).exp()
    whole = weight.sum(1)
    out = out.mul_(weight[..., None]).sum(1).div_(whole.masked_fill(whole == 0, 1)[..., None])
    return out, whole.log() + peak[:, 0]


def _by_page_size(parts: list[_Part]) -> list[list[_Part]]:
    """Parts whose pages are of one size, together."""
    sizes: dict[int, list[_Part]] = {}
    for part in parts:
        sizes.setdefault(part.pages.k.shape[1], []).append(part)
    return list(sizes.values())


def _attend(queries: _Queries, parts: list[_Part], scale: float, *, clean: bool) -> tuple[Tensor, Tensor]:
    """out [U, W, G * T, D] and lse [U, W, G * T] of every page; 0 and -inf where its row sees nothing of it.

    All but keys and values is small, and put together for all parts, whose pages are of one size.
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
        mask = torch.where(visible, torch.zeros((), dtype=dtype, device=owner.device), float("-inf"))
    else:
        visible &= (bias != float("-inf"))[:, None]
        mask = torch.where(visible, bias[:, None].to(dtype), float("-inf"))
    q, blind = queries.q.index_select(0, owner), ~visible.any(2)
    if time.shape[1] > 1:  # the queries of a group stand one after the other; what is the same for all, SDPA repeats
        group = q.shape[2] // time.shape[1]
        mask, blind = mask.repeat(1, group, 1), blind.repeat(1, group)
    outs, lses, begin = [], [], 0
    for part in parts:
        own = slice(begin, begin + len(part.owner))
        begin = own.stop
        k, v = part.pages[:2]
        if clean:
            unseen = ~visible[own].any(1)[:, :, None, None]
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
        out, lse = attend(q[own], k, v, mask[own, None], scale)
        outs.append(out)
        lses.append(lse)
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
    blind = blind[:, None]
    return out.masked_fill_(blind[..., None], 0), lse.masked_fill_(blind, float("-inf"))
