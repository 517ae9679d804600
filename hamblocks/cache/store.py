"""The KV cache of a layer: what is stored of every sequence and key/value head, in pages of a pool."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hamblocks.cache.changes import make
from hamblocks.cache.commit import Commit
from hamblocks.cache.pool import Pool, Tokens
from hamblocks.cache.rows import Rows, lasting, ranked
from hamblocks.protocols import Lifetimes, check_count
from hamblocks.selectors import EMPTY, lower
from hamblocks_ops import NEVER, Pages, unpage
from hamblocks_ops.arguments import (
    check_integer,
    check_range,
    check_tensor,
    values_are_checked,
    wrong,
)


class Stored(NamedTuple):
    """What a cache holds, padded to the fullest head.

    Attributes:
        k: `[N, L, Hkv, D]`, keys as attention reads them (normalised, rotated).
        v: `[N, L, Hkv, D]`.
        position: int32 `[N, L, Hkv]`, in no order; NEVER where there is no token, so that no query sees it.
        evict_at: int32 `[N, L, Hkv]`, 0 where there is no token.
        logit_bias: float32 `[N, L, Hkv]`, or None.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    evict_at: Tensor
    logit_bias: Tensor | None


@final
class KVCache:
    """Stored tokens of N sequences, ragged, in fixed-size pages; attention reads them where they lie.

    A handle: `lower` and `append` say what is to change and give a handle that shows it; `commit` changes the pages in
    place, gives the next handle, and spends all handles before it. Any failure before that leaves the cache as it was
    (see `cache_transaction`). A token that dies leaves a hole that the next one fills; once the holes of a row are
    worth a page, its last tokens move into them and the page goes back to the pool. What is stored carries no gradient.

    A cache has one row of pages per sequence and key/value head (H = Hkv), or one per sequence (H = 1) where the layer
    decides for its heads together.
    """

    def __init__(
        self, rows: Rows, *, until: Tensor | None = None, new: Stored | None = None
    ) -> None:
        """Use `KVCache.empty`."""
        self._rows, self._pool, self._turn = rows, rows.pool, rows.turn
        self._until, self._new = until, new

    @staticmethod
    @lasting
    def empty(
        sequences: int,
        kv_heads: int,
        head_dim: int,
        like: Tensor,
        *,
        shared: bool = False,
        logit_bias: bool = False,
        page_size: int = 32,
        max_pages: int | None = None,
    ) -> KVCache:
        """A cache without a token.

        Args:
            sequences: N.
            kv_heads: Hkv.
            head_dim: D.
            like: any tensor of the dtype and on the device of the keys.
            shared: one lifetime of a token for all heads (H = 1).
            logit_bias: tokens carry a bias.
            page_size: tokens in a page.
            max_pages: the most pages that the pool may grow to; None: no limit.

        Raises:
            ValueError: a size is no integer or too small.
        """
        for name, value, least in (("sequences", sequences, 0), ("page_size", page_size, 1)):
            check_count(name, value, least)
        if max_pages is not None:
            check_count("max_pages", max_pages)
        heads = 1 if shared else kv_heads
        pool = Pool(
            page_size, kv_heads // heads, head_dim, like, logit_bias=logit_bias, max_pages=max_pages
        )
        table = torch.empty(sequences * heads, 0, dtype=torch.int32, device=like.device)
        return KVCache(
            Rows(pool, table, torch.zeros(sequences, dtype=torch.int32, device=like.device), heads)
        )

    # what it is

    @property
    def sequences(self) -> int:
        """N."""
        return self._rows.sequences

    @property
    def row_heads(self) -> int:
        """H: rows per sequence."""
        return self._rows.heads

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self._rows.heads * self._pool.heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self._pool.head_dim

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._pool.page_size

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._pool.dtype

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._pool.device

    @property
    def has_bias(self) -> bool:
        """Whether tokens carry a logit bias."""
        return self._pool.bias is not None

    @property
    def seen(self) -> Tensor:
        """Tokens seen of every sequence, int32 `[N]`."""
        return self._own().seen.clone()

    @property
    def tokens(self) -> Tensor:
        """How many tokens are stored, int64 `[N, Hkv]`."""
        rows = self._own()
        count = rows.alive(self._lifetimes()).sum(1)
        return count.view(self.sequences, self.row_heads).repeat_interleave(self._pool.heads, 1)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one stored token of one row takes."""
        return self._pool.token_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes in use: the pages that rows list, each once, and the lists; waits for the device."""
        rows = self._own()
        pages = int((rows.table.unique() >= 0).sum())
        return pages * self.page_size * self.token_nbytes + rows.table.nbytes + rows.seen.nbytes

    @property
    def capacity_nbytes(self) -> int:
        """Bytes allocated: all slabs of the pool, free pages and those of forks among them, and the lists."""
        rows = self._own()
        return self._pool.nbytes + rows.lease.table.nbytes + rows.seen.nbytes

    @property
    def spent(self) -> bool:
        """Whether a later call went on from this handle, or the call that was to make it failed."""
        return self._turn != self._rows.turn

    def check(self) -> None:
        """Makes sure that this is the newest handle.

        Raises:
            ValueError: a later call went on from it, or an open transaction has still to change it.
        """
        if self._rows.pending:
            raise ValueError(
                "state: expected one call that changes it in a transaction, got a second"
            )
        if self.spent:
            raise ValueError(
                "state: expected the newest, got one that a later call went on from (fork() it before that call, to go "
                "on from the same point twice) or that a failed call was to return"
            )

    # what attention reads

    @property
    def slabs(self) -> list[Pages]:
        """The pool's slabs and, as the last one, the tokens that were appended: what `paged_attention` takes.

        Raises:
            ValueError: not `in_place`.
        """
        rows, pool = self._own(), self._pool
        if not self.in_place:
            raise ValueError(
                "cache: expected one whose pages have one user, to show lowered lifetimes, got one forked"
            )
        slabs = pool.slabs(
            None if self._until is None else rows.put_back(self._until, pool.evict_at.clone())
        )
        if self._new is not None:
            slabs.append(self._by_row(self._new))
        return slabs

    @property
    def block_table(self) -> Tensor:
        """Pages of every row, int32 `[N, H, M]`, -1 for none: what `paged_attention` takes."""
        table = self._own().table
        if self._new is not None:
            own = torch.arange(
                self._pool.pages,
                self._pool.pages + len(table),
                dtype=torch.int32,
                device=self.device,
            )
            table = torch.cat([table, own[:, None]], 1)
        return table.view(self.sequences, self.row_heads, table.shape[1])

    @property
    def private(self) -> bool:
        """Whether it is known that no page is listed twice."""
        return self._own().private

    @property
    def in_place(self) -> bool:
        """Whether `slabs` show it: lifetimes lowered for one row only cannot be shown in a page that another lists."""
        return self._until is None or self.private

    def read(self) -> Stored:
        """All that is stored, and what was appended, as padded tensors: a copy. Those appended carry gradient."""
        rows = self._own()
        table = rows.table.view(self.sequences, self.row_heads, rows.width)
        k, v, _, _, bias = unpage(self._pool.slabs(), table)
        until = self._lifetimes()
        alive = rows.alive(until)
        position, until = (
            rows.for_heads(rows.by_sequence(x))
            for x in (rows.position().where(alive, NEVER), until.where(alive, 0))
        )
        stored = Stored(k, v, position, until, None if bias is None else rows.for_heads(bias))
        if self._new is None:
            return stored
        new = self._new
        k, v, position, until = (
            torch.cat([old, own], 1) for old, own in zip(stored[:4], new[:4], strict=True)
        )
        if stored.logit_bias is None or new.logit_bias is None:
            return Stored(k, v, position, until, None)
        return Stored(k, v, position, until, torch.cat([stored.logit_bias, new.logit_bias], 1))

    # what changes it

    def lower(self, changes: Lifetimes | None) -> KVCache:
        """The cache after a selector lowered lifetimes, `[N, L, H]` or `[N, L, 1]`."""
        rows = self._own()
        if changes is None:
            return self
        if changes.position.shape[2] not in (1, self.row_heads):
            raise wrong(
                "changes",
                f"{self.row_heads} heads, as the rows",
                f"{changes.position.shape[2]} heads",
            )
        changes = Lifetimes(*(x.expand(-1, -1, self.row_heads) for x in changes))
        until = self._lifetimes()
        # a hole still names the token that it held
        position = rows.position().where(rows.alive(until), EMPTY)
        lowered = lower(rows.by_sequence(position), rows.by_sequence(until), changes)
        return KVCache(rows, until=lowered.mT.flatten(0, 1), new=self._new)

    def append(
        self,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        evict_at: Tensor,
        logit_bias: Tensor | None = None,
    ) -> KVCache:
        """The cache with new tokens.

        Args:
            k: `[N, T, Hkv, D]`, as attention reads them.
            v: `[N, T, Hkv, D]`.
            position: int32 `[N, T]`, not before what was seen; -1 for padding.
            evict_at: int32 `[N, T, H]` or `[N, T, 1]`.
            logit_bias: `[N, T, Hkv]` or `[N, T, 1]`, if the cache has biases; of the heads of a row, the first counts.

        Raises:
            ValueError: a bad argument; the message names it.
        """
        rows = self._own()
        if self._new is not None:
            raise ValueError("cache: expected one append between two commits, got a second")
        check_tensor("k", k, "[N, T, Hkv, D]", [self.sequences, None, self.kv_heads, self.head_dim])
        tokens = k.shape[1]
        check_tensor("v", v, "[N, T, Hkv, D]", [*k.shape], like=k)
        for name, value in (("k", k), ("v", v)):
            if value.dtype != self.dtype or value.device != self.device:
                raise wrong(
                    name,
                    f"{str(self.dtype).removeprefix('torch.')} on {self.device}, as the cache",
                    value,
                )
        check_tensor("position", position, "[N, T]", [self.sequences, tokens], like=k)
        if isinstance(evict_at, Tensor) and evict_at.dim() == 3 and evict_at.shape[2] == 1:
            evict_at = evict_at.expand(-1, -1, self.row_heads)
        check_tensor(
            "evict_at", evict_at, "[N, T, H]", [self.sequences, tokens, self.row_heads], like=k
        )
        for name, value in (("position", position), ("evict_at", evict_at)):
            check_integer(name, value)
        bias = None
        if (logit_bias is None) == self.has_bias:
            raise wrong(
                "logit_bias",
                "a bias, as the cache has" if self.has_bias else "None, as the cache",
                logit_bias,
            )
        if logit_bias is not None and self._pool.bias is not None:
            heads = (
                1 if isinstance(logit_bias, Tensor) and logit_bias.shape[-1] == 1 else self.kv_heads
            )
            check_tensor(
                "logit_bias", logit_bias, "[N, T, Hkv]", [self.sequences, tokens, heads], like=k
            )
            bias = logit_bias.to(self._pool.bias.dtype).expand(-1, -1, self.kv_heads)
        if values_are_checked(position):
            early = (position >= 0) & (position < rows.seen[:, None])
            if bool(early.any()):
                n, t = (int(i) for i in early.nonzero()[0])
                expected = f"none before the {int(rows.seen[n])} tokens that sequence {n} has seen"
                raise wrong("position", expected, f"{int(position[n, t])}")
        where = (
            torch.where(position < 0, NEVER, position)
            .to(torch.int32)[..., None]
            .expand(-1, -1, self.kv_heads)
        )
        until = rows.for_heads(evict_at.to(torch.int32))
        return KVCache(rows, until=self._until, new=Stored(k, v, where, until, bias))

    @lasting
    def commit(self, seen: Tensor) -> KVCache:
        """Stores what was appended and lowered, without what no query from position `seen` on sees.

        Args:
            seen: int32 `[N]`, tokens seen of every sequence.

        Returns:
            The next handle; this one and those it came from are spent.

        Raises:
            ValueError: `max_pages` does not allow it; the cache is as it was.
        """
        rows = self._own()
        check_tensor("seen", seen, "[N]", [self.sequences])
        new = None
        if self._new is not None:
            k, v, position, evict_at, bias = self._by_row(self._new)
            k, v, position, evict_at = (
                x.detach().flatten(0, 1) for x in (k, v, position, evict_at)
            )
            new = Tokens(
                k, v, position, evict_at, None if bias is None else bias.detach().flatten()
            )
        make(Commit(rows, seen, self._until, new))
        following = KVCache(rows)
        following._turn = self._turn + 1
        return following

    @lasting
    def reserve(self, steps: int) -> None:
        """Takes the pages that `steps` more tokens per sequence need at the worst.

        Until they are used up, a commit neither fails nor waits for the device: its shapes depend on no value. Slabs
        and tables stay where they are, as a CUDA graph needs it.

        Raises:
            ValueError: `max_pages` does not allow it; the cache is as it was.
        """
        check_count("steps", steps)
        rows, pool = self._own(), self._pool
        each = -(-steps // self.page_size)
        wanted, common = each * len(rows.table), rows.common()
        pool.ensure(wanted + int(common.sum()) - rows.lease.promised)
        rows.stop_reserving()
        rows.unshare(common)
        rows.private = True
        most = int((rows.table >= 0).sum(1).max()) if rows.table.numel() else 0
        rows.lease.widen(most + each)
        rows.width, rows.credit = most + each, steps
        rows.lease.promised = wanted
        pool.promised += wanted

    @lasting
    def fork(self) -> KVCache:
        """A second cache with the same tokens; a page is copied when one of the two changes it."""
        rows = self._own()
        rows.stop_reserving()
        rows.private = False
        self._pool.list(rows.table, 1)
        return KVCache(Rows(self._pool, rows.table, rows.seen.clone(), rows.heads, private=False))

    @lasting
    def reorder(self, index: Tensor) -> KVCache:
        """The cache of sequences index[0], index[1], ..., as beam search wants; this one is spent.

        Args:
            index: int `[K]`, of sequences; any may come several times or not at all.

        Raises:
            ValueError: no such sequence.
        """
        rows = self._own()
        check_tensor("index", index, "[K]", [None], like=rows.table)
        check_integer("index", index)
        check_range("index", index, 0, self.sequences - 1)
        index = index.long()
        table = rows.table.unflatten(0, (self.sequences, self.row_heads))[index].flatten(0, 1)
        self._pool.list(table, 1)
        rows.end()
        rows.turn += 1
        return KVCache(Rows(self._pool, table, rows.seen[index], rows.heads, private=False))

    @lasting
    def reset(self, sequences: Tensor) -> KVCache:
        """The cache after some sequences, bool `[N]`, forgot everything; this handle is spent.

        Raises:
            ValueError: a bad argument.
        """
        rows = self._own()
        check_tensor("sequences", sequences, "[N]", [self.sequences], like=rows.table)
        if sequences.dtype != torch.bool:
            raise wrong("sequences", "dtype bool", sequences)
        gone = sequences.repeat_interleave(self.row_heads)[:, None]
        self._pool.list(torch.where(gone, rows.table, -1), -1)
        rows.table.masked_fill_(gone, -1)
        rows.seen.masked_fill_(sequences, 0)
        rows.turn += 1
        return KVCache(rows)

    def state_dict(self) -> dict[str, Any]:
        """What is stored, without holes, as tensors and numbers: for `torch.save`, and `KVCache.load`."""
        rows, pool = self._own(), self._pool
        alive = rows.alive(self._lifetimes())
        count = alive.sum(1)
        row, place = ranked(count, rows.position().where(alive, NEVER).argsort(dim=1, stable=True))
        tokens = pool.read(rows.slots(row, place))
        return {
            **{name: x for name, x in tokens._asdict().items() if x is not None},
            "lengths": count.view(self.sequences, self.row_heads),
            "seen": rows.seen.clone(),
            "page_size": self.page_size,
            "max_pages": pool.max_pages,
        }

    @staticmethod
    @lasting
    def load(state: dict[str, Any], device: torch.device | str | None = None) -> KVCache:
        """A cache of its own from `state_dict()`; device: None for that of its tensors.

        Raises:
            ValueError: `max_pages` is less than it takes.
        """
        state = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in state.items()}
        k, lengths, bias = state["k"], state["lengths"], state.get("logit_bias")
        pool = Pool(
            state["page_size"],
            k.shape[1],
            k.shape[2],
            k,
            logit_bias=bias is not None,
            max_pages=state["max_pages"],
        )
        counts = lengths.flatten()
        pages = -(-counts // pool.page_size)
        total, most = (int(pages.sum()), int(pages.max())) if len(pages) else (0, 0)
        pool.ensure(total)
        table = torch.full((len(pages), most), -1, dtype=torch.int32, device=k.device)
        taken = torch.arange(most, device=k.device) < pages[:, None]
        table[taken] = torch.arange(total, dtype=torch.int32, device=k.device)
        pool.list(table, 1)
        rows = Rows(pool, table, state["seen"].clone(), lengths.shape[1])
        row, place = ranked(
            counts, torch.arange(most * pool.page_size, device=k.device).expand(len(pages), -1)
        )
        tokens = Tokens(k, state["v"], state["position"], state["evict_at"], bias)
        pool.write(rows.slots(row, place), tokens, wait=True)
        return KVCache(rows)

    def to(self, device: torch.device | str) -> KVCache:
        """A copy of its own on a device."""
        return KVCache.load(self.state_dict(), device)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self.to(self.device)

    def __repr__(self) -> str:
        state = ", spent" if self.spent else ""
        return (
            f"KVCache({self.sequences} sequences, {self.kv_heads} heads of {self.head_dim}{state})"
        )

    def _own(self) -> Rows:
        self.check()
        return self._rows

    def _by_row(self, new: Stored) -> Pages:
        """What was appended, one page per row."""
        rows = self._rows
        k, v, position, evict_at = (rows.by_row(x) for x in new[:4])
        bias = None if new.logit_bias is None else rows.by_row(new.logit_bias)[..., 0]
        return Pages(k, v, position[..., 0], evict_at[..., 0], bias)

    def _lifetimes(self) -> Tensor:
        """Of every slot of a row, lowered ones as they are to be, `[R, S]`."""
        return self._rows.lifetimes() if self._until is None else self._until
