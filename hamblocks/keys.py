"""Keys: all that attention may read in one call, whether it lies in dense tensors or in pages.

An attention part gets `(q, keys)` and cannot tell which kind it has. `attend` is the one place that
chooses an implementation; `explain` shows that choice with its reasons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar, final

import torch
from torch import Tensor

from hamblocks_ops import (
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
from hamblocks_ops.precision import wide
from hamblocks_ops.selected_attention import AttentionOutput

Result = TypeVar("Result")

PAGED_MAX_QUERIES = 8
"""With up to this many queries per sequence, "auto" reads pages where they lie. With more, a padded
copy of the pages costs less than reading every page once per query."""


class Keys(ABC):
    """What may be read in one call.

    Attributes:
        query_position: int32 `[B, T]`, position of each query within its sequence, -1 for padding,
            which sees nothing.
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
                `paged_attention`; "auto": the first in `explain(q)` that answers "yes".

        Returns:
            out `[B, T, H, D]` in the dtype of q, 0 where a query sees nothing, and lse
            `[B, T, H]`, -inf there.

        Raises:
            UnsupportedError: `impl` cannot run this call.
            ValueError: there is no such implementation.
        """

    @abstractmethod
    def explain(self, q: Tensor, *, scale: float | None = None) -> Explanation:
        """Every way to run `attend(q)`, in the order of "auto", with "yes" or a reason why not."""

    @abstractmethod
    def dense(self) -> DenseKeys:
        """The same keys as plain tensors. Keys in pages are copied."""


@final
class DenseKeys(Keys):
    """Keys as plain tensors, for arithmetic of one's own.

    Query t sees key j iff `position[j] <= query_position[t] < evict_at[j]` and both are of one
    sequence. `logits`, `softmax` and `read` are the three steps of attention, so that a part
    changes only the step it is about:

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
        """Calls what takes the arguments of `selected_attention`."""
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
        """Itself."""
        return self

    # the steps of attention

    def visible(self, num_heads: int | None = None) -> Tensor:
        """Which query sees which key, bool.

        Args:
            num_heads: H, to repeat what several key/value heads decided for their query heads.

        Returns:
            `[B, H, T, L]`; without `num_heads` `[B, Hkv, T, L]`. `[B, 1, T, L]` where all heads see
            the same.
        """
        asked = self.query_position[:, None, :, None]
        begins, ends = (_by_head(x)[:, :, None] for x in (self.position, self.evict_at))
        seen = (begins <= asked) & (asked < ends) & (asked >= 0)
        if self.cu_seqlens is not None:
            sequence = sequence_of(self.cu_seqlens, self.k.shape[1])
            seen = seen & (sequence[:, None] == sequence)
        return _for_queries(seen, num_heads)

    def distance(self, num_heads: int | None = None) -> Tensor:
        """How many tokens a key lies behind a query, int32, shaped as `visible`; 0 where unseen."""
        back = self.query_position[:, None, :, None] - _by_head(self.position)[:, :, None]
        return _for_queries(torch.where(self.visible(), back, 0), num_heads)

    def logits(self, q: Tensor, *, scale: float | None = None) -> Tensor:
        """scale * q k^T + logit_bias, for every key, seen or not: `softmax` hides what is unseen.

        Args:
            q: `[B, T, H, D]`; query head h reads key/value head h // (H // Hkv).
            scale: factor of the products; None: D ** -0.5.

        Returns:
            `[B, H, T, L]`, float32, float64 for float64 q.
        """
        dtype, group = wide(q), q.shape[2] // self.k.shape[2]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        grouped = q.to(dtype).unflatten(2, (-1, group))
        logits = scale * torch.einsum("bthgd,blhd->bhgtl", grouped, self._seen(self.k).to(dtype))
        if self.logit_bias is not None:
            logits = logits + _by_head(self.logit_bias.to(dtype))[:, :, None, None]
        return logits.flatten(1, 2)

    def softmax(self, logits: Tensor, *, null: Tensor | None = None) -> Tensor:
        """Weights of the keys that a query sees: 0, and not NaN, where it sees none.

        Args:
            logits: `[B, H, T, L]`.
            null: `[H]`, logits of one more key, whose value is 0: with it a query may read nothing.

        Returns:
            `[B, H, T, L]`.
        """
        seen = self.visible(logits.shape[1])
        logits = logits.masked_fill(~seen, float("-inf"))
        if null is not None:
            null = null.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, null], -1)
        peak = logits.detach().amax(-1, keepdim=True)
        weight = (logits - peak.masked_fill(peak == float("-inf"), 0)).exp()
        total = weight.sum(-1, keepdim=True)
        weight = weight / total.masked_fill(total == 0, 1)
        return weight if null is None else weight[..., :-1]

    def read(self, weights: Tensor) -> Tensor:
        """The weighted sum of values: weights `[B, H, T, L]` -> `[B, T, H, D]`, dtype of v."""
        kv_heads = self.v.shape[2]
        grouped = weights.unflatten(1, (kv_heads, -1))
        values = self._seen(self.v).to(weights.dtype)
        return torch.einsum("bhgtl,blhd->bthgd", grouped, values).flatten(2, 3).to(self.v.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        """k or v with zeros where no query sees the key: it may hold NaN, and 0 * NaN is NaN."""
        seen = self.visible().any(2).mT[..., None]
        return x.masked_fill(~seen, 0)


@final
class PagedKeys(Keys):
    """The pages of a cache, together with the tokens of the call.

    Attributes:
        query_position: int32 `[N, T]`.
    """

    def __init__(
        self,
        query_position: Tensor,
        *,
        pages: Callable[[], tuple[Sequence[Pages], Tensor]],
        shared: bool | None,
        learns: bool,
        not_in_place: str | None,
        copy: Callable[[], DenseKeys],
    ) -> None:
        """Made by the cache.

        Args:
            query_position: int32 `[N, T]`.
            pages: gives the slabs and the page table that `paged_attention` takes.
            shared: whether a page may be listed twice, as `paged_attention` takes it.
            learns: whether a tensor of the new tokens requires a gradient.
            not_in_place: why the pages cannot be read where they lie, or None.
            copy: gives the same keys as padded tensors.
        """
        self.query_position = query_position
        self._pages, self._copy = pages, copy
        self._shared, self._learns, self._not_in_place = shared, learns, not_in_place

    def attend(
        self, q: Tensor, *, scale: float | None = None, impl: str = "auto"
    ) -> AttentionOutput:
        """See `Keys.attend`."""
        choices = CHOICES.get()
        if choices is None:
            return self._attend(q, scale, impl)
        before = len(choices)
        result = self._attend(q, scale, impl)
        # one choice among all ways to read, in place of that of the op that was called
        choices[before:] = [Choice("attention", impl, self.explain(q, scale=scale))]
        return result

    def _attend(self, q: Tensor, scale: float | None, impl: str) -> AttentionOutput:
        if not self._reads_pages(q, impl):
            return self.dense().attend(q, scale=scale, impl=impl)
        slabs, table = self._pages()
        return paged_attention(
            q,
            slabs,
            table,
            query_position=self.query_position,
            scale=scale,
            shared=self._shared,
            impl=impl,
        )

    def explain(self, q: Tensor, *, scale: float | None = None) -> Explanation:
        """See `Keys.explain`: first the implementations that read pages, then those over a copy."""
        refused, passed_over = self._refused(q), self._passed_over()
        answers: dict[str, str] = {}
        if refused is None:
            slabs, table = self._pages()
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
        """The pages and the new tokens as padded tensors: a copy. New tokens carry gradient."""
        return self._copy()

    def _reads_pages(self, q: Tensor, impl: str) -> bool:
        """Whether pages are read where they lie; else a copy is."""
        refused = self._refused(q)
        if impl == "auto":
            return refused is None and self._passed_over() is None
        if impl not in implementations(paged_attention):
            return False
        if refused is not None and impl not in implementations(selected_attention):
            raise UnsupportedError(f"attention cannot run with impl={impl!r} here: {refused}")
        return refused is None

    def _refused(self, q: Tensor) -> str | None:
        """Why pages cannot be read where they lie, or None."""
        if torch.is_grad_enabled() and (q.requires_grad or self._learns):
            return "attention over pages has no gradient (call it under torch.no_grad())"
        return self._not_in_place

    def _passed_over(self) -> str | None:
        """Why "auto" reads a copy though pages could be read in place."""
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
    """`[B, Hkv, T, L]` -> `[B, H, T, L]`; one head for all stays one."""
    if num_heads is None or x.shape[1] in (1, num_heads):
        return x
    return x.repeat_interleave(num_heads // x.shape[1], 1)
