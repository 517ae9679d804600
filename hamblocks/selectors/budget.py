"""Bounds the number of tokens that another selector stores."""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hamblocks.ledger import EMPTY, last_slots, lower, new_positions, of_another
from hamblocks.protocols import Lifetimes, Selection, Selector, check_count
from hamblocks.selectors.questions import ignores_score, start
from hamblocks.selectors.times import time_keys
from hamblocks.selectors.topk import empty_ledger
from hamblocks.selectors.wrapper import Wrapper
from hamblocks_ops import NEVER, select_topk, select_window
from hamblocks_ops.arguments import wrong
from hamblocks_ops.select.topk import kth_smallest


class BudgetLedger(NamedTuple):
    """The tokens that have a place in a `Budget` now.

    Attributes:
        position: int32 `[N, tokens, H]`, -1 for empty slots.
        evict_at: int32 `[N, tokens, H]`, their lifetimes under `inner`.
        score: `[N, tokens, H]`, 0 for empty slots; None where the oldest leaves.
        inner: the ledger of `inner`; None if it has none.
    """

    position: Tensor
    evict_at: Tensor
    score: Tensor | None
    inner: Any


@final
class Budget(Wrapper):
    """Never stores more than `tokens` tokens per sequence and head, whatever `inner` admits.

    When `inner` admits a token and all places are taken, one token leaves. Let e(i) be the lifetime
    of token i under `inner`, which admits it if e(i) > i.

    `leaves="oldest"`: of the tokens that `inner` stores now, the newest `tokens` are stored. Token
    j leaves when `inner` stores as many later tokens as there are places:

        evict_at[j] = min(e(j), the first t >= j with #{i : j < i <= t < e(i)} >= tokens)

    A token that `inner` evicts frees its place.

    `leaves="lowest"`: the tokens that `inner` admits compete by score, as in `TopK(tokens)`. Token
    j leaves when as many of them have beaten it as there are places:

        evict_at[j] = min(e(j), the first t >= j with
                          #{i <= t : e(i) > i, i beats j} >= tokens)

    Token i beats j if its score is larger, or equal and i < j. A token that `inner` evicts keeps
    its place until it is beaten, because freeing it would make each decision wait for the one
    before. So use this rule with an `inner` that stores tokens for good. It differs from
    `inner & TopK(tokens)`, where the tokens that `inner` refuses compete too.

    To keep some tokens in any case, combine: `Budget(inner, tokens) | FirstTokens(4)`.
    """

    def __init__(self, inner: Selector, tokens: int, *, leaves: str = "oldest") -> None:
        """Makes the selector.

        Args:
            inner: any selector.
            tokens: the most tokens that are stored per sequence and head, >= 0.
            leaves: which token leaves when all places are taken, "oldest" or "lowest".

        Raises:
            ValueError: `inner` is no selector, `tokens` is no integer >= 0, or `leaves` is another
                word.
        """
        super().__init__(inner)
        tokens = check_count("tokens", tokens)
        if leaves not in ("oldest", "lowest"):
            raise wrong("leaves", "'oldest' or 'lowest'", repr(leaves))
        self.tokens = tokens
        self.leaves = leaves

    @property
    def ignores_score(self) -> bool:
        """Whether neither the inner selector nor the rule looks at scores."""
        return self.leaves == "oldest" and ignores_score(self.inner)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"tokens={self.tokens}, leaves={self.leaves!r}"

    @classmethod
    def of_bytes(
        cls,
        inner: Selector,
        nbytes: int,
        *,
        head_dim: int,
        num_kv_heads: int = 1,
        dtype: torch.dtype = torch.float32,
        leaves: str = "oldest",
    ) -> Budget:
        """A budget in bytes of keys and values.

        A stored token takes `2 * head_dim * dtype.itemsize` bytes per key/value head, so

            tokens = nbytes // (2 * num_kv_heads * head_dim * dtype.itemsize)

        The cache holds 8 more bytes per token and head for position and lifetime, and whole pages.

        Args:
            inner: any selector.
            nbytes: bytes per sequence of one layer, >= 0.
            head_dim: D, the size of a head, >= 1.
            num_kv_heads: Hkv, the key/value heads that share the bytes, >= 1.
            dtype: of the stored keys and values.
            leaves: as in the constructor.

        Raises:
            ValueError: a bad argument.
        """
        nbytes = check_count("nbytes", nbytes)
        head_dim = check_count("head_dim", head_dim, 1)
        num_kv_heads = check_count("num_kv_heads", num_kv_heads, 1)
        if not isinstance(dtype, torch.dtype):
            raise wrong("dtype", "a torch.dtype", dtype)
        token = 2 * num_kv_heads * head_dim * dtype.itemsize
        return cls(inner, nbytes // token, leaves=leaves)

    def start(
        self, batch_size: int, heads: int, device: torch.device | None = None
    ) -> BudgetLedger:
        """The empty ledger: `tokens` empty slots per sequence and head, and the ledger of inner."""
        inner = start(self.inner, batch_size, heads, device)
        position, score = empty_ledger(self.tokens, batch_size, heads, device)
        return BudgetLedger(position, position, None if self.leaves == "oldest" else score, inner)

    def forward(
        self,
        score: Tensor,
        ledger: BudgetLedger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        given = {"position": position, "cu_seqlens": cu_seqlens}
        if ledger is None:
            own = select_window(score, 0, **given)
            lived = self.inner(score, **given).evict_at
            if self.leaves == "oldest":
                return Selection(newest(own, lived, self.tokens, cu_seqlens))
            return Selection(lowest(score, own, lived, self.tokens, cu_seqlens)[0])
        if not isinstance(ledger, BudgetLedger):
            raise of_another(ledger, BudgetLedger)
        own = new_positions(score, position, cu_seqlens)
        inner = self.inner(score, ledger.inner, **given)
        # The stored tokens come first, as if all tokens came in one sequence.
        known = lower(ledger.position, ledger.evict_at, inner.lowered)
        where = torch.cat([ledger.position, own], 1)
        lived = torch.cat([known, inner.evict_at], 1)
        scores = None
        if ledger.score is None:
            evict_at = newest(where, lived, self.tokens)
            now = torch.nn.functional.pad(where, [0, 0, 1, 0], value=EMPTY).amax(1, keepdim=True)
            placed = evict_at > now  # the next query sees them
        else:
            dtype = torch.promote_types(score.dtype, ledger.score.dtype)  # as in TopK
            scores = torch.cat([ledger.score.to(dtype), score.to(dtype)], 1)
            evict_at, placed = lowest(scores, where, lived, self.tokens)
        kept = last_slots(placed, self.tokens)
        after = BudgetLedger(
            kept.take(where, EMPTY),
            kept.take(lived, EMPTY),
            None if scores is None else kept.take(scores, 0),
            inner.ledger,
        )
        lowered = Lifetimes(ledger.position, evict_at[:, : self.tokens])
        return Selection(evict_at[:, self.tokens :], lowered, after)


def lowest(
    score: Tensor, position: Tensor, evict_at: Tensor, count: int, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lifetimes if the admitted tokens compete for `count` places by score.

    Args:
        score: `[B, T, H]`.
        position: int32 `[B, T, H]`, ascending within a sequence; -1 for padding.
        evict_at: int32 `[B, T, H]`, lifetimes without that bound.
        count: the number of places.
        cu_seqlens: borders of packed sequences.

    Returns:
        Lifetimes int32 `[B, T, H]`, and which tokens have a place in the end, bool `[B, T, H]`.
    """
    rivals = torch.where(evict_at > position, position, EMPTY)
    beaten = select_topk(score, count, position=rivals, cu_seqlens=cu_seqlens)
    lived = torch.where(beaten < 0, position, torch.minimum(evict_at, beaten))
    return lived, beaten == NEVER


def newest(
    position: Tensor, evict_at: Tensor, count: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Lifetimes if only the newest `count` living tokens are stored at any time.

    Args:
        position: int32 `[B, T, H]`, ascending within a sequence; -1 for padding.
        evict_at: int32 `[B, T, H]`, lifetimes without that bound.
        count: the bound.
        cu_seqlens: borders of packed sequences.

    Returns:
        int32 `[B, T, H]`. O(T log T), without a loop over tokens.
    """
    batch, tokens, heads = position.shape
    if tokens == 0:
        return evict_at
    flat = batch * heads, tokens
    admitted = ((position >= 0) & (evict_at > position)).mT.reshape(flat)
    # Time is counted in columns. `until` is the first column whose query does not see a token.
    key, ends = time_keys(position, cu_seqlens), time_keys(position, cu_seqlens, evict_at)
    until = torch.searchsorted(key, ends).reshape(flat).where(admitted, 0)
    column = torch.arange(tokens, device=position.device).repeat(flat[0], 1)
    # The token that leaves at column t, or left before, is the newest living one but `tokens`.
    # In the order of `until`, those that live at t or come later are a prefix. Those that come
    # later are the newest in it.
    ascending, order = until.sort(1)
    living = tokens - torch.searchsorted(ascending.contiguous(), column, right=True)
    later = admitted.sum(1, keepdim=True) - admitted.cumsum(1)
    rank = tokens - 1 - order.flip(1)
    oldest = tokens - 1 - kth_smallest(rank, torch.zeros_like(living), living, later + count)
    oldest = torch.where(living > later + count, oldest, -1).cummax(1).values.contiguous()
    leaves = torch.searchsorted(oldest, column)
    gone = (leaves < until).view(batch, heads, tokens).mT
    leaves = leaves.clamp(max=tokens - 1).view(batch, heads, tokens).mT
    return torch.where(gone, position.gather(1, leaves), evict_at)
