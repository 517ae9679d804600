"""The KV cache of a layer: the stored tokens of every sequence and head, in pages of a pool."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, final

import torch
from torch import Tensor

from hamblocks.cache.changes import apply_or_queue
from hamblocks.cache.checks import (
    check_decisions,
    check_keys,
    check_order,
    check_sequences,
    check_tokens,
)
from hamblocks.cache.decisions import lowered_lifetimes
from hamblocks.cache.extension import CallTokens, Extension, Stored, stored
from hamblocks.cache.forks import Renewal, mixed
from hamblocks.cache.pool import Pool
from hamblocks.cache.saving import loaded, saved
from hamblocks.cache.streams import Streams, Unallocated, lasting
from hamblocks.keys import PagedKeys
from hamblocks.protocols import Lifetimes, check_count
from hamblocks_ops import NEVER
from hamblocks_ops.arguments import (
    check_integer,
    check_range,
    check_tensor,
    values_are_checked,
    wrong,
)
from hamblocks_ops.context import CHECKED
from hamblocks_ops.packing import int32, no_padding

P = ParamSpec("P")
T = TypeVar("T")


def locked(method: Callable[Concatenate[KVCache, P], T]) -> Callable[Concatenate[KVCache, P], T]:
    """Runs a method of a cache while no other thread uses the pool.

    No other thread may run between the check that a handle is the newest and its use, or between
    the steps that make a fork.
    """

    @functools.wraps(method)
    def alone(cache: KVCache, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with cache._own.lock:
            return method(cache, *args, **kwargs)

    return alone


class CacheSizes(NamedTuple):
    """Shapes of a cache, known after the first token.

    Attributes:
        num_kv_heads: Hkv.
        head_dim: D.
        streams: streams per sequence (H): 1 if the layer decides for its heads together, else
            num_kv_heads.
        page_size: tokens in a page.
        token_nbytes: bytes of one stored token of one stream.
        logit_bias: whether tokens have a logit bias.
        dtype: dtype of keys and values.
        device: device of the pages.
    """

    num_kv_heads: int
    head_dim: int
    streams: int
    page_size: int
    token_nbytes: int
    logit_bias: bool
    dtype: torch.dtype
    device: torch.device


@final
class KVCache:
    """Stored tokens of N sequences of different lengths, in fixed-size pages.

    A cache is empty at first and takes dtype, device and shapes from the first tokens. A `KVCache`
    is a handle. `extend` returns an `Extension`: the cache together with the tokens of a call. Its
    `commit` stores them in place and returns the next handle. The old handle is then spent: using
    it raises an error. A failure before the commit leaves the cache as it was (see
    `cache_transaction`). Stored tokens have no gradient.

    A stream is a sequence with one key/value head, or with all heads if they store the same tokens.
    An evicted token leaves a hole, which a new token of its stream fills. If the remaining tokens
    of a stream fit into fewer pages, the last ones move into holes and the pages return to the
    pool.

    Forks share pages, and each of them may be used by a thread of its own. If two threads use one
    handle at once, one of them gets an error.

    Users read `tokens`, `nbytes` and `stored()`. States and layers call the other methods.
    """

    def __init__(
        self, batch_size: int, *, page_size: int = 32, max_pages: int | None = None
    ) -> None:
        """Makes an empty cache.

        Args:
            batch_size: N.
            page_size: tokens in a page.
            max_pages: upper limit of pages in the pool; None: no limit.

        Raises:
            ValueError: a size is not an integer, or too small.
        """
        batch_size = check_count("batch_size", batch_size)
        page_size = check_count("page_size", page_size, 1)
        if max_pages is not None:
            max_pages = check_count("max_pages", max_pages)
        self._own: Streams | Unallocated = Unallocated(batch_size, page_size, max_pages)
        self._turn = 0

    @staticmethod
    def _of(own: Streams | Unallocated, turn: int | None = None) -> KVCache:
        """A handle of existing streams.

        Args:
            own: what the handle refers to.
            turn: the turn at which the handle is valid; None: the current one.
        """
        cache = KVCache.__new__(KVCache)
        cache._own, cache._turn = own, own.turn if turn is None else turn
        return cache

    # for users

    @property
    def batch_size(self) -> int:
        """N, the number of sequences."""
        return self._own.sequences

    @property
    def sizes(self) -> CacheSizes | None:
        """Shapes, dtype and device; None before the first token."""
        own = self._own
        if isinstance(own, Unallocated):
            return None
        pool = own.pool
        return CacheSizes(
            num_kv_heads=own.heads * pool.heads,
            head_dim=pool.head_dim,
            streams=own.heads,
            page_size=pool.page_size,
            token_nbytes=pool.token_nbytes,
            logit_bias=pool.bias is not None,
            dtype=pool.dtype,
            device=pool.device,
        )

    @property
    @locked
    def tokens(self) -> Tensor:
        """Number of stored tokens, int64 `[N, Hkv]`; `[N, 0]` before the first token."""
        own = self._newest()
        if isinstance(own, Unallocated):
            return torch.zeros(own.sequences, 0, dtype=torch.int64, device="cpu")
        count = own.alive(own.lifetimes()).sum(1).view(own.sequences, own.heads)
        return count.repeat_interleave(own.pool.heads, 1)

    @property
    @locked
    def nbytes(self) -> int:
        """Bytes in use: pages (a shared page counts once) and tables. Waits for the device."""
        return self.pages_nbytes + self.tables_nbytes

    @property
    @locked
    def pages_nbytes(self) -> int:
        """Bytes of the pages in use; a shared page counts once. Waits for the device."""
        own = self._settled()
        if isinstance(own, Unallocated):
            return 0
        pages = int((own.table.unique() >= 0).sum())
        return pages * own.pool.page_size * own.pool.token_nbytes

    @property
    @locked
    def tables_nbytes(self) -> int:
        """Bytes of the page tables and of the numbers of tokens seen."""
        own = self._newest()
        return 0 if isinstance(own, Unallocated) else own.table.nbytes + own.seen.nbytes

    @property
    @locked
    def capacity_nbytes(self) -> int:
        """Bytes allocated: tables, and the slabs of the pool with free pages and those of forks."""
        own = self._newest()
        if isinstance(own, Unallocated):
            return 0
        return own.pool.nbytes + own.lease.table.nbytes + own.seen.nbytes

    @locked
    def stored(self) -> Stored:
        """A copy of the stored tokens as padded tensors; before the first token, with 0 heads."""
        own = self._settled()
        if not isinstance(own, Unallocated):
            return stored(own)
        keys = torch.zeros(own.sequences, 0, 0, 0, device="cpu")
        times = torch.zeros(own.sequences, 0, 0, dtype=torch.int32, device="cpu")
        return Stored(keys, keys, times, times, None)

    def keys(self, query_position: Tensor) -> PagedKeys:
        """The keys that attention reads: the stored tokens only.

        Args:
            query_position: int32 `[N, T]`, position of each query within its sequence.

        Raises:
            ValueError: no token was ever stored, or a bad argument.
        """
        own, sizes = self._newest(), self.sizes
        if isinstance(own, Unallocated) or sizes is None:
            raise wrong("cache", "one that has taken a token", "an empty one")
        check_tensor("query_position", query_position, "[N, T]", [own.sequences, None])
        # an extension by no tokens
        k = torch.empty(own.sequences, 0, sizes.num_kv_heads, sizes.head_dim, dtype=sizes.dtype).to(
            sizes.device
        )
        times = torch.empty(own.sequences, 0, own.heads, dtype=torch.int32, device=k.device)
        bias = times.to(own.pool.bias.dtype) if own.pool.bias is not None else None
        new = CallTokens(k, k, times[..., 0], times, bias)
        return Extension(
            own, new, None, query_position, None, check=self.check, following=_following
        ).keys

    # for layers and states

    def check(self) -> None:
        """Checks that this is the newest handle.

        Raises:
            ValueError: the handle is spent, or an open transaction has already planned a change.
        """
        self._newest()

    @locked
    def check_reserve(self) -> None:
        """Checks that no replayed CUDA graph went past the reserved steps. Waits for the device.

        Methods that wait for the device anyway check it too.

        Raises:
            ValueError: a sequence has seen more tokens than were reserved, or the handle is spent.
        """
        self._settled()

    def extend(
        self,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        evict_at: Tensor,
        logit_bias: Tensor | None = None,
        lowered: Lifetimes | None = None,
    ) -> Extension:
        """The cache with new tokens and lowered lifetimes; it changes only at the commit.

        Args:
            k: `[N, T, Hkv, D]`, as attention reads them.
            v: `[N, T, Hkv, D]`.
            position: int32 `[N, T]`, at least the number of tokens seen; -1 for padding.
            evict_at: int32 `[N, T, H]` or `[N, T, 1]`, lifetimes of the new tokens.
            logit_bias: `[N, T, Hkv]` or `[N, T, 1]`; either all tokens of a cache have one or none.
            lowered: `[N, L, H]` or `[N, L, 1]`, lifetimes that the selector lowered.

        Raises:
            ValueError: a bad argument, or one that does not fit the stored tokens.
        """
        own = self._newest()
        if not CHECKED.get():
            self._check_fit(k, v, position, evict_at, logit_bias)
            position, evict_at = int32(position), int32(evict_at)
        if isinstance(own, Unallocated):
            streams, origin = _allocated(own, k, evict_at, logit_bias), own
        else:
            streams, origin = own, None
        if values_are_checked(position):
            check_order(position, streams.seen)
        until = None if lowered is None else lowered_lifetimes(streams, lowered)
        evict_at = evict_at.to(torch.int32)
        if evict_at.shape[2] != streams.heads:
            evict_at = evict_at.expand(-1, -1, streams.heads)
        # position NEVER: no query sees padding, and the commit does not store it
        where = position
        if not no_padding(position):
            where = torch.where(position < 0, NEVER, position)
        bias = None
        if logit_bias is not None and streams.pool.bias is not None:
            bias = logit_bias.to(streams.pool.bias.dtype)
        new = CallTokens(k, v, where.to(torch.int32), evict_at, bias)
        return Extension(
            streams, new, until, position, origin, check=self.check, following=_following
        )

    @lasting
    @locked
    def reserve(self, steps: int) -> None:
        """Reserves the pages that `steps` more tokens per sequence need at most.

        Until these pages are used up, a call cannot run out of pages and does not wait for the
        device, because its shapes depend on no values. Slabs and tables keep their addresses, which
        a CUDA graph needs. In an empty cache the pages are reserved by the first call.

        A CUDA graph that is replayed past the reservation stores tokens only as long as reserved
        pages have room, and drops the others. `check_reserve` reports it.

        Raises:
            ValueError: the pool would exceed `max_pages`, or a CUDA graph was replayed past an
                earlier reservation; the cache is as it was.
        """
        steps = check_count("steps", steps)
        own = self._newest()
        if isinstance(own, Unallocated):
            own.steps = steps
        else:
            own.reserve(steps)

    # for replays of a captured step, which the host has to count (see `hamblocks.graphed`)

    @property
    def lock(self) -> threading.RLock:
        """The lock of the pool. While a thread holds it, no other changes a cache of the pool."""
        return self._own.lock

    @property
    def pool_version(self) -> int:
        """How often the pool has grown or shrunk; each time its tensors are replaced."""
        own = self._own
        return 0 if isinstance(own, Unallocated) else own.pool.version

    @locked
    def check_reserved(self) -> None:
        """Checks that a step is reserved, as the host counts them; it waits for no device.

        Raises:
            ValueError: no step is reserved, or the handle is spent.
        """
        own = self._newest()
        steps = own.steps if isinstance(own, Unallocated) else own.reservation.steps
        # pages that are shared end a reservation (see `fork`)
        if steps < 1:
            raise wrong(
                "reserve", "a reserved step", "none (forking a state ends what it reserved)"
            )

    @locked
    def replayed(self) -> KVCache:
        """Counts a step that a captured graph replays, and returns the next handle.

        It does what `Extension.commit` does on the host, and the graph does the rest.

        Raises:
            ValueError: as `check_reserved`.
        """
        self.check_reserved()
        own = self._own
        assert isinstance(own, Streams)
        own.reservation.steps -= 1
        own.turn += 1
        return KVCache._of(own)

    @locked
    def uncounted(self) -> KVCache:
        """The handle to continue from after a failed capture, whose step the device did not run."""
        own = self._own
        if own.turn != self._turn:
            assert isinstance(own, Streams)
            own.reservation.steps += 1
        return KVCache._of(own)

    @lasting
    @locked
    def fork(self) -> KVCache:
        """A second cache with the same tokens; a page is shared until one of the two changes it."""
        own = self._settled()
        if isinstance(own, Unallocated):
            return KVCache._of(own.copy())
        # A reservation promises not to wait, but a shared page must be copied before it changes,
        # and finding such pages waits for the device.
        own.reservation.release()
        own.private = False
        own.pool.count_users(own.table, 1)
        return KVCache._of(Streams(own.pool, own.table, own.seen.clone(), own.heads, private=False))

    @locked
    def renewed(self) -> KVCache:
        """A new handle of the same tokens; this one is spent.

        In a transaction it is spent when the transaction ends.
        """
        own = self._newest()
        following = KVCache._of(own, own.turn + 1)
        apply_or_queue(Renewal(own))
        return following

    @staticmethod
    @lasting
    def mixed(caches: Sequence[KVCache], choice: Sequence[int]) -> KVCache:
        """The cache whose sequence n is that of `caches[choice[n]]`; the caches stay as they are.

        Args:
            caches: forks of one cache, with tokens.
            choice: N numbers.

        Raises:
            ValueError: a cache is spent.
        """
        with caches[0]._own.lock:
            streams = [cache._settled() for cache in caches]
            allocated = [one for one in streams if isinstance(one, Streams)]
            assert len(allocated) == len(caches)
            return KVCache._of(mixed(allocated, choice))

    @lasting
    @locked
    def reorder(self, index: Tensor) -> KVCache:
        """The cache of sequences index[0], index[1], ..., for beam search; this handle is spent.

        Args:
            index: int `[K]`, indices of sequences; repeated and missing ones are allowed.

        Raises:
            ValueError: an index is out of range.
        """
        own = self._settled()
        like = None if isinstance(own, Unallocated) else own.table
        check_tensor("index", index, "[K]", [None], like=like)
        check_integer("index", index)
        check_range("index", index, 0, own.sequences - 1)
        if isinstance(own, Unallocated):
            own.turn += 1
            return KVCache._of(own.copy(len(index)))
        index = index.long()
        table = own.table.unflatten(0, (own.sequences, own.heads))[index].flatten(0, 1)
        # The new table counts its pages first. `end` puts the old table into a queue, and the next
        # `Pool.collect` returns the pages that only the old table lists.
        own.pool.count_users(table, 1)
        own.end()
        own.turn += 1
        return KVCache._of(Streams(own.pool, table, own.seen[index], own.heads, private=False))

    @lasting
    @locked
    def reset(self, sequences: Tensor) -> KVCache:
        """The cache after all tokens of some sequences were dropped; this handle is spent.

        Args:
            sequences: bool `[N]`, the sequences to empty.

        Raises:
            ValueError: a bad argument.
        """
        own = self._newest()
        like = None if isinstance(own, Unallocated) else own.table
        check_sequences(sequences, own.sequences, like=like)
        if isinstance(own, Streams):
            # by masks instead of indices, so that it does not wait for the device
            gone = sequences.repeat_interleave(own.heads)[:, None]
            own.pool.count_users(torch.where(gone, own.table, -1), -1)
            own.table.masked_fill_(gone, -1)
            own.relisted()
            own.seen.masked_fill_(sequences, 0)
            own.reservation.renew(sequences, gone[:, 0])
        own.turn += 1
        return KVCache._of(own)

    @locked
    def state_dict(self) -> dict[str, Any]:
        """The stored tokens as flat tensors, and sizes as numbers, for `torch.save` and `load`."""
        return saved(self._settled())

    @staticmethod
    def load(state: dict[str, Any], device: torch.device | str | None = None) -> KVCache:
        """Makes a cache from `state_dict()`.

        Args:
            state: the saved state.
            device: device of the cache; None: the device of the saved tensors.

        Raises:
            ValueError: the tokens need more than `max_pages` pages.
        """
        if "seen" not in state:  # the cache was saved before its first token
            return KVCache(**state)
        return KVCache._of(loaded(state, device))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle and copy take the stored tokens: a pool has a lock, and may be shared by forks
        return KVCache.load, (self.state_dict(),)

    def __repr__(self) -> str:
        sizes = self.sizes
        what = "empty" if sizes is None else f"{sizes.num_kv_heads} heads of {sizes.head_dim}"
        spent = ", spent" if self._turn != self._own.turn else ""
        return f"KVCache({self.batch_size} sequences, {what}{spent})"

    def _check_fit(
        self, k: Tensor, v: Tensor, position: Tensor, evict_at: Tensor, logit_bias: Tensor | None
    ) -> None:
        """Checks that the tensors of a call fit each other and the stored tokens."""
        own = self._own
        if isinstance(own, Streams):
            check_keys(own, k, v)
        check_tokens(k, v, position, evict_at, logit_bias, own.sequences)
        if isinstance(own, Streams):
            check_decisions(own, evict_at, logit_bias)

    def _settled(self) -> Streams | Unallocated:
        """As `_newest`; it also raises as `check_reserve` does."""
        own = self._newest()
        if isinstance(own, Streams):
            own.reservation.settle(own.seen)
        return own

    def _newest(self) -> Streams | Unallocated:
        """What the handle refers to; raises as `check` does."""
        if self._own.pending:
            raise ValueError(
                "state: expected one call that changes it in a transaction, got a second"
            )
        if self._turn != self._own.turn:
            raise ValueError(
                "state: expected the newest, got one that a later call went on from (fork() it "
                "before that call, to go on from the same point twice) or that a failed call was "
                "to return"
            )
        return self._own


def _following(streams: Streams) -> KVCache:
    """The handle that a commit returns; it is valid once the change is applied."""
    return KVCache._of(streams, streams.turn + 1)


@lasting
def _allocated(own: Unallocated, k: Tensor, evict_at: Tensor, logit_bias: Tensor | None) -> Streams:
    """Makes streams without pages, with the sizes, dtype and device of these tokens."""
    kv_heads, head_dim = k.shape[2:]
    bias_heads = 1 if logit_bias is None else logit_bias.shape[2]
    # one stream serves all heads if neither lifetimes nor biases differ between heads
    heads = 1 if max(evict_at.shape[2], bias_heads) == 1 else kv_heads
    pool = Pool(
        own.page_size,
        kv_heads // heads,
        head_dim,
        k,
        logit_bias=logit_bias is not None,
        max_pages=own.max_pages,
    )
    # a handle without tokens and the pool that it becomes are guarded by one lock
    pool.lock = own.lock
    streams = Streams.empty(pool, own.sequences, heads)
    if own.steps:
        streams.reserve(own.steps)
    return streams
