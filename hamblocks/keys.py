"""Keys: all keys and values that attention may read in one call, in dense tensors or in pages.

An attention part gets `(q, keys)`. `DenseKeys` and `PagedKeys` have the same interface, so the part
runs unchanged with either. `attend` chooses the implementation; `explain` shows that choice and the
reasons for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar, final

import torch
from torch import Tensor

from hamblocks_ops import (
    NEVER,
    Explanation,
    Pages,
    UnsupportedError,
    explain,
    implementations,
    paged_attention,
    selected_attention,
)
from hamblocks_ops.context import CHOICES, Choice
from hamblocks_ops.dispatch import WHEN_NAMED
from hamblocks_ops.packing import sequence_of
from hamblocks_ops.paged_attention import PageMemo
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention import AttentionOutput

Result = TypeVar("Result")

PAGED_MAX_QUERIES = 8
"""With up to this many queries per sequence, "auto" reads pages in place. With more, copying the
pages into padded tensors once costs less than reading every page once per query."""


class Keys(ABC):
    """The keys and values that may be read in one call.

    Attributes:
        query_position: int32 `[B, T]`, position of each query within its sequence; -1 for padding.
            A padding query sees no key.
    """

    query_position: Tensor

    @abstractmethod
    def attend(
        self, q: Tensor, *, scale: float | None = None, impl: str = "auto"
    ) -> AttentionOutput:
        """Softmax attention over the keys that each query sees (see `hamblocks.ops`).

        Args:
            q: `[B, T, H, D]`.
            scale: factor of the logits; None: D ** -0.5.
            impl: an implementation of `selected_attention` or, for keys in pages, of
                `paged_attention`; "auto": the first one whose entry in `explain(q)` is "yes".

        Returns:
            out `[B, T, H, D]` in the dtype of q, and lse `[B, T, H]`. For a query that sees no
            key, out is 0 and lse is -inf.

        Raises:
            UnsupportedError: `impl` cannot run this call.
            ValueError: there is no such implementation.
        """

    @abstractmethod
    def explain(self, q: Tensor, *, scale: float | None = None) -> Explanation:
        """Lists every implementation of `attend(q)` with "yes" or the reason why it cannot run.

        The order is the one in which "auto" tries them.
        """

    @abstractmethod
    def dense(self) -> DenseKeys:
        """The same keys as plain tensors. Keys in pages are copied."""

    @abstractmethod
    def for_queries(self, query_position: Tensor) -> Keys:
        """The same keys, for other queries.

        Args:
            query_position: int32 `[B, T]`, ascending in every batch row, -1 for padding.
        """


@final
class DenseKeys(Keys):
    """Keys as plain tensors, for attention parts that compute attention themselves.

    Query t sees key j iff `position[j] <= query_position[t] < evict_at[j]` and both belong to the
    same sequence. `logits`, `softmax` and `read` are the three steps of attention; a part can
    replace one of them and reuse the others:

        dense = keys.dense()
        weights = dense.softmax(dense.logits(q) - slope * dense.distance(q.shape[2]))
        return dense.read(weights)

    Attributes:
        k: `[B, L, Hkv, D]`.
        v: `[B, L, Hkv, D]`.
        position: int32 `[B, L, Hkv]` or `[B, L]`, position of each key within its sequence.
        evict_at: int32 `[B, L, Hkv]` or `[B, L, 1]`.
        logit_bias: `[B, L, Hkv]` or `[B, L, 1]`, or None.
        query_position: int32 `[B, T]`.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences (then B = 1 and L = T), or None.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        evict_at: Tensor,
        query_position: Tensor,
        logit_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        self.k, self.v = k, v
        self.position, self.evict_at, self.logit_bias = position, evict_at, logit_bias
        self.query_position, self.cu_seqlens = query_position, cu_seqlens

    def attend(
        self, q: Tensor, *, scale: float | None = None, impl: str = "auto"
    ) -> AttentionOutput:
        """See `Keys.attend`."""
        return self._run(selected_attention, q, scale=scale, impl=impl)

    def explain(self, q: Tensor, *, scale: float | None = None) -> Explanation:
        """See `Keys.explain`."""
        return self._run(selected_attention.explain, q, scale=scale)

    def _run(self, run: Callable[..., Result], q: Tensor, **more: object) -> Result:
        """Calls `run` with these keys as the arguments of `selected_attention`."""
        return run(
            q,
            self.k,
            self.v,
            self.evict_at,
            logit_bias=self.logit_bias,
            cu_seqlens=self.cu_seqlens,
            query_position=self.query_position,
            key_position=self.position,
            **more,
        )

    def dense(self) -> DenseKeys:
        """Returns self."""
        return self

    def for_queries(self, query_position: Tensor) -> DenseKeys:
        """See `Keys.for_queries`."""
        return self._with(query_position=query_position)

    def within(self, window: int) -> DenseKeys:
        """These keys for queries that see at most the last `window` tokens, themselves included."""
        position = self.position if self.position.dim() == 3 else self.position[..., None]
        # an unused entry has position NEVER, which must not overflow
        window = min(window, NEVER)
        until = position.clamp(max=NEVER - window) + window
        return self._with(evict_at=torch.minimum(self.evict_at, until))

    def _with(self, **changed: Tensor) -> DenseKeys:
        """A copy with some attributes changed."""
        given = dict(vars(self), **changed)
        return DenseKeys(given.pop("k"), given.pop("v"), **given)

    # the three steps of attention, and the mask that they use

    def visible(self, num_heads: int | None = None) -> Tensor:
        """Which query sees which key, bool.

        Args:
            num_heads: H, to repeat the mask of each key/value head for its query heads.

        Returns:
            `[B, H, T, L]`, or `[B, Hkv, T, L]` without `num_heads`. `[B, 1, T, L]` if position and
            evict_at are the same for all heads.
        """
        asked = self.query_position[:, None, :, None]
        begins, ends = (_by_head(x)[:, :, None] for x in (self.position, self.evict_at))
        seen = (begins <= asked) & (asked < ends) & (asked >= 0)
        if self.cu_seqlens is not None:
            sequence = sequence_of(self.cu_seqlens, self.k.shape[1])
            seen = seen & (sequence[:, None] == sequence)
        return _for_queries(seen, num_heads)

    def distance(self, num_heads: int | None = None) -> Tensor:
        """query_position - key position, int32, shape as `visible`; 0 where the key is not seen."""
        back = self.query_position[:, None, :, None] - _by_head(self.position)[:, :, None]
        return _for_queries(torch.where(self.visible(), back, 0), num_heads)

    def logits(self, q: Tensor, *, scale: float | None = None) -> Tensor:
        """scale * q k^T + logit_bias for every key. The mask is applied later, in `softmax`.

        Args:
            q: `[B, T, H, D]`; query head h reads key/value head h // (H // Hkv).
            scale: factor of the products; None: D ** -0.5.

        Returns:
            `[B, H, T, L]`, float32, or float64 for float64 q.
        """
        dtype, group = wide(q), q.shape[2] // self.k.shape[2]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        grouped = q.to(dtype).unflatten(2, (-1, group))
        logits = scale * torch.einsum("bthgd,blhd->bhgtl", grouped, self._seen(self.k).to(dtype))
        if self.logit_bias is not None:
            logits = logits + _by_head(self.logit_bias.to(dtype))[:, :, None, None]
        return logits.flatten(1, 2)

    def softmax(self, logits: Tensor, *, null: Tensor | None = None) -> Tensor:
        """Softmax over the keys that each query sees; all 0, not NaN, if it sees no key.

        Args:
            logits: `[B, H, T, L]`.
            null: `[H]`, logits of an extra key whose value is 0, which lets a query read nothing.
                Its weight is not returned, so the weights of a query may sum to less than 1.

        Returns:
            `[B, H, T, L]`.
        """
        seen = self.visible(logits.shape[1])
        logits = logits.masked_fill(~seen, float("-inf"))
        if null is not None:
            null = null.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, null], -1)
        # the shift by the maximum cancels in the quotient, so it needs no gradient
        peak = logits.detach().amax(-1, keepdim=True)
        # a query without keys has peak -inf, and -inf - -inf would be NaN: shift by 0 instead
        weight = (logits - peak.masked_fill(peak == float("-inf"), 0)).exp()
        total = weight.sum(-1, keepdim=True)  # 0 for a query without keys
        weight = weight / total.masked_fill(total == 0, 1)
        return weight if null is None else weight[..., :-1]

    def read(self, weights: Tensor) -> Tensor:
        """Sums the values with weights `[B, H, T, L]`; returns `[B, T, H, D]` in the dtype of v."""
        kv_heads = self.v.shape[2]
        grouped = weights.unflatten(1, (kv_heads, -1))
        values = self._seen(self.v).to(weights.dtype)
        return torch.einsum("bhgtl,blhd->bthgd", grouped, values).flatten(2, 3).to(self.v.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        """Zeros the entries of k or v that no query sees.

        Such an entry may hold NaN. Its weight is 0, but 0 * NaN is NaN.
        """
        seen = self.visible().any(2).mT[..., None]
        return x.masked_fill(~seen, 0)


@final
class PagedKeys(Keys):
    """The pages of a cache, and the new tokens of the call.

    Attributes:
        query_position: int32 `[N, T]`.
    """

    def __init__(
        self,
        query_position: Tensor,
        *,
        pages: Callable[[], tuple[Sequence[Pages], Tensor, PageMemo | None]],
        shared: bool | None,
        learns: bool,
        not_in_place: str | None,
        copy: Callable[[], DenseKeys],
    ) -> None:
        """Called by the cache only.

        Args:
            query_position: int32 `[N, T]`.
            pages: returns the slabs, the page table and the memo that `paged_attention` takes.
            shared: the argument `shared` of `paged_attention`: whether two streams may list the
                same page; None: not known.
            learns: whether a tensor of the new tokens requires a gradient.
            not_in_place: why the pages cannot be read in place, or None.
            copy: returns the same keys as padded tensors.
        """
        self.query_position = query_position
        self._pages, self._copy = pages, copy
        self._shared, self._learns, self._not_in_place = shared, learns, not_in_place

    def for_queries(self, query_position: Tensor) -> PagedKeys:
        """See `Keys.for_queries`."""
        return PagedKeys(
            query_position,
            pages=self._pages,
            shared=self._shared,
            learns=self._learns,
            not_in_place=self._not_in_place,
            copy=lambda: self._copy().for_queries(query_position),
        )

    def attend(
        self, q: Tensor, *, scale: float | None = None, impl: str = "auto"
    ) -> AttentionOutput:
        """See `Keys.attend`."""
        choices = CHOICES.get()
        if choices is None:
            return self._attend(q, scale, impl)
        before = len(choices)
        result = self._attend(q, scale, impl)
        # The op that ran recorded a choice among its own implementations. Callers of `explain` need
        # one entry that lists the implementations of both ops, so that entry replaces it.
        choices[before:] = [Choice("attention", impl, self.explain(q, scale=scale))]
        return result

    def _attend(self, q: Tensor, scale: float | None, impl: str) -> AttentionOutput:
        if not self._reads_pages(q, impl):
            return self.dense().attend(q, scale=scale, impl=impl)
        slabs, table, memo = self._pages()
        return paged_attention(
            q,
            slabs,
            table,
            query_position=self.query_position,
            scale=scale,
            shared=self._shared,
            memo=memo,
            impl=impl,
        )

    def explain(self, q: Tensor, *, scale: float | None = None) -> Explanation:
        """See `Keys.explain`: first the implementations that read pages, then those that copy."""
        refused, passed_over = self._refused(q), self._passed_over()
        answers: dict[str, str] = {}
        if refused is None:
            slabs, table, _ = self._pages()
            found = explain(
                paged_attention, q, slabs, table, query_position=self.query_position, scale=scale
            )
            for name, answer in found.items():
                if answer == "yes" and passed_over is not None:
                    answer = WHEN_NAMED + passed_over
                answers[f"paged_attention {name}"] = answer
        else:
            answers = {
                f"paged_attention {name}": refused for name in implementations(paged_attention)
            }
        copied = self.dense().explain(q, scale=scale)
        answers |= {f"selected_attention {name}": answer for name, answer in copied.items()}
        return Explanation(answers)

    def dense(self) -> DenseKeys:
        """Copies the pages and the new tokens into padded tensors.

        Gradients flow to the new tokens only.
        """
        return self._copy()

    def _reads_pages(self, q: Tensor, impl: str) -> bool:
        """Whether `attend` reads the pages in place; otherwise it reads a padded copy."""
        refused = self._refused(q)
        if impl == "auto":
            return refused is None and self._passed_over() is None
        if impl not in implementations(paged_attention):
            return False  # selected_attention runs it, or raises if there is no such name
        # a name that exists in both ops, such as "reference", runs on a copy if pages are refused
        if refused is not None and impl not in implementations(selected_attention):
            raise UnsupportedError(f"attention cannot run with impl={impl!r} here: {refused}")
        return refused is None

    def _refused(self, q: Tensor) -> str | None:
        """Why pages cannot be read in place, or None."""
        if torch.is_grad_enabled() and (q.requires_grad or self._learns):
            return "attention over pages has no gradient (call it under torch.no_grad())"
        return self._not_in_place

    def _passed_over(self) -> str | None:
        """Why "auto" reads a copy although pages could be read in place, or None."""
        queries = self.query_position.shape[1]
        if queries <= PAGED_MAX_QUERIES:
            return None
        return (
            f"a padded copy is faster for more than {PAGED_MAX_QUERIES} queries, this is {queries}"
        )


def _by_head(x: Tensor) -> Tensor:
    """`[B, L]` or `[B, L, heads]` -> `[B, heads, L]`."""
    return x[:, None] if x.dim() == 2 else x.transpose(1, 2)


def _for_queries(x: Tensor, num_heads: int | None) -> Tensor:
    """`[B, Hkv, T, L]` -> `[B, H, T, L]`; a size of 1, which serves all heads, stays 1."""
    if num_heads is None or x.shape[1] == 1 or x.shape[1] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[1], 1)
