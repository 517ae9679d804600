"""Batches as transformers describes them (padded or packed), and as the layers take them (packed).

Shape letters are explained in docs/reference/shapes.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hamblocks.parallel.shard import ContextShard
from hamblocks.protocols import check_count
from hamblocks_ops import packing
from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_integer,
    check_tensor,
    values_are_checked,
    wrong,
)

IGNORE = -100
"""The label that losses ignore."""


class BatchLayout(NamedTuple):
    """Where the real tokens of a batch `[B, T]` are, and which sequence each belongs to.

    Attributes:
        batch: B, the number of batch rows.
        tokens: T, the number of columns.
        real: int64 `[K]`, indices of the real tokens among all B * T; None: no token is padding.
            While a model is exported, the padding follows as one more sequence, so that K is B * T.
        cu_seqlens: int32 `[N+1]`, borders of the sequences among the real tokens. None: every batch
            row is one sequence without padding.
        padding: bool `[B * T]`, the tokens of that one more sequence; None: there is none.
    """

    batch: int
    tokens: int
    real: Tensor | None
    cu_seqlens: Tensor | None
    padding: Tensor | None = None

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def pack(self, x: Tensor) -> Tensor:
        """Turns `[B, T, ...]` into what the layers take: packed `[1, K, ...]`, or x itself.

        x itself is returned where every batch row is one sequence without padding.
        """
        if self.cu_seqlens is None:
            return x
        x = x.flatten(0, 1)
        return (x if self.real is None else x[self.real])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Turns a result of the layers back into `[B, T, ...]`, with zeros at padding."""
        if self.cu_seqlens is None:
            return x
        if self.real is not None:
            x = x.new_zeros(self.batch * self.tokens, *x.shape[2:]).index_copy(0, self.real, x[0])
        if self.padding is not None:
            x = x.masked_fill(self.padding.view(-1, *[1] * (x.dim() - 1)), 0)
        return x.view(self.batch, self.tokens, *x.shape[2 if self.real is None else 1 :])

    def tokens_of_columns(self, device: torch.device) -> Tensor:
        """Which columns hold tokens, bool `[B, T]`."""
        if self.real is None:
            return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=device)
        return self.unpack(torch.ones(1, self.real.shape[0], dtype=torch.bool, device=device))

    def targets(self, labels: Tensor) -> Tensor:
        """Shifts labels `[B, T]`, so that each token gets the label of the next one.

        Where the next token is padding or belongs to another sequence, the target is -100.
        """
        labels = F.pad(labels, [0, 1], value=IGNORE)[:, 1:]
        if self.cu_seqlens is None:
            return labels
        count = self.batch * self.tokens if self.real is None else self.real.shape[0]
        # sequences are numbered from 1, because `unpack` fills padding with 0
        sequence = self.unpack(packing.sequence_of(self.cu_seqlens, count)[None] + 1)
        goes_on = (sequence == F.pad(sequence, [0, 1])[:, 1:]) & (sequence > 0)
        return labels.masked_fill(~goes_on, IGNORE)


def batch_layout(
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: int = 0,
    seen: Tensor | None = None,
) -> BatchLayout:
    """Finds the layout of a batch from the arguments with which transformers describes it.

    On the meta device, where there are no values, every batch row is one sequence without padding.

    Args:
        x: `[B, T]` or `[B, T, hidden]`, the new columns.
        attention_mask: `[B, past + T]`, 1 for tokens and 0 for padding. Padding stands before or
            after the tokens of a batch row, or both, never between them.
        position_ids: int `[B, T]` or `[1, T]`, position of each token within its sequence; values
            at padding are ignored. Without a mask and a cache, every 0 begins a sequence.
        cu_seqlens: int `[N+1]`, borders of sequences packed into one batch row.
        past: number of columns that a cache has seen.
        seen: int `[B]`, number of tokens in these columns. None: there is no cache.

    Raises:
        ValueError: an argument is wrong. The message names it, what was expected and what came.
    """
    batch, tokens = x.shape[:2]
    if position_ids is not None:
        check_tensor("position_ids", position_ids, "[B, T]", [None, tokens], like=x)
        check_integer("position_ids", position_ids)
        if position_ids.shape[0] != 1 and position_ids.shape[0] != batch:
            raise wrong("position_ids", f"shape [B, T] = [{batch}, {tokens}]", position_ids)
        position_ids = position_ids.expand(batch, -1)
    if cu_seqlens is not None:
        return _bordered(x, cu_seqlens, attention_mask, position_ids, seen)
    if attention_mask is None and seen is None and position_ids is not None:
        return _restarting(position_ids)
    if attention_mask is None:
        layout, real = BatchLayout(batch, tokens, None, None), None
    else:
        real = _real(x, attention_mask, past, seen)
        # torch before 2.7 does not say that it exports, and stops at the branch below
        if seen is None and getattr(torch.compiler, "is_exporting", bool)():
            layout = _exported(real)
        # without values nobody knows what is padding, and the sizes are at most those of T tokens
        elif real.is_meta or bool(real.all()):
            layout = BatchLayout(batch, tokens, None, None)
        else:
            borders = F.pad(real.sum(1).cumsum(0), [1, 0]).to(torch.int32)
            layout = BatchLayout(batch, tokens, real.flatten().nonzero()[:, 0], borders)
    if position_ids is not None:
        _check_positions(position_ids, real, seen)
    return layout


def _exported(real: Tensor) -> BatchLayout:
    """The layout of a padded batch `[B, T]` with sizes that depend on no value.

    The tokens of every batch row come first. All padding comes after them, as a sequence that no
    token of another one sees.
    """
    batch, tokens = real.shape
    padding = ~real.flatten()
    order = padding.to(torch.int8).argsort(stable=True)
    ends = torch.cat(
        [real.sum(1).cumsum(0), padding.new_full((1,), batch * tokens, dtype=torch.int64)]
    )
    return BatchLayout(batch, tokens, order, F.pad(ends, [1, 0]).to(torch.int32), padding)


def last_columns(x: Tensor, count: int | Tensor) -> Tensor:
    """The last `count` columns of x `[B, T, ...]`, or those that a tensor lists; 0 means all."""
    if isinstance(count, Tensor):
        return x[:, count]
    return x[:, -count:] if count else x


def check_beside_shard(x: Tensor, shard: ContextShard, **given: object) -> None:
    """Checks a batch of a rank's tokens, and that nothing is given that the shard replaces.

    Raises:
        ValueError: x has another number of tokens, or an argument is not None.
    """
    rows = 1 if shard.packed else x.shape[0]
    if tuple(x.shape[:2]) != (rows, shard.local_tokens):
        expected = f"the tokens of this rank, [{rows}, {shard.local_tokens}] (shard.take)"
        raise wrong("input_ids", expected, list(x.shape[:2]))
    for name, value in given.items():
        if value is not None:
            raise wrong(name, "None beside a shard, which holds whole sequences", value)


def check_kept(logits_to_keep: object) -> int | Tensor:
    """Checks which columns get logits: a number of columns, or an integer tensor that lists them.

    Raises:
        ValueError: it is neither.
    """
    name = "logits_to_keep"
    if isinstance(logits_to_keep, Tensor):
        check_integer(name, logits_to_keep)
        check_tensor(name, logits_to_keep, "[columns]", [None])
        return logits_to_keep
    if isinstance(logits_to_keep, torch.SymInt):  # traced; it is no `numbers.Integral`
        return logits_to_keep  # type: ignore[return-value]
    return check_count(name, logits_to_keep)


def _bordered(
    x: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    seen: Tensor | None,
) -> BatchLayout:
    """The layout of one batch row with given borders."""
    for name, value in (("attention_mask", mask), ("past_key_values", seen)):
        if value is not None:
            raise wrong(name, "None beside cu_seq_lens_q", "both")
    check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x)
    cu_seqlens = cu_seqlens.to(torch.int32)
    if position_ids is not None and values_are_checked(position_ids):
        within = packing.positions(1, x.shape[1], device=x.device, cu_seqlens=cu_seqlens)
        if not torch.equal(within, position_ids.to(within.dtype)):
            raise wrong(
                "position_ids",
                "positions that restart at 0 where cu_seq_lens_q has a border",
                "other positions",
            )
    return BatchLayout(1, x.shape[1], None, cu_seqlens)


def _restarting(position_ids: Tensor) -> BatchLayout:
    """The layout of a packed batch whose sequences begin where the position is 0.

    A batch row may hold several sequences, and never a part of one: position 0 starts every row.
    """
    batch, tokens = position_ids.shape
    begins = position_ids == 0
    if position_ids.is_meta or bool(
        (position_ids == torch.arange(tokens, device=position_ids.device)).all()
    ):
        return BatchLayout(batch, tokens, None, None)
    if values_are_checked(position_ids):
        follows = F.pad(position_ids, [1, 0])[:, :-1] + 1
        bad = ~begins & (position_ids != follows)
        bad[:, 0] = ~begins[:, 0]
        if bool(bad.any()):
            b, column = (int(index) for index in bad.nonzero()[0])
            expected = "0" if column == 0 else f"0 or {int(follows[b, column])}"
            got = f"{int(position_ids[b, column])} in batch row {b}, column {column}"
            raise wrong("position_ids", f"{expected} (padding is given by attention_mask)", got)
    first = begins.flatten().nonzero()[:, 0]
    return BatchLayout(
        batch, tokens, None, F.pad(first, [0, 1], value=batch * tokens).to(torch.int32)
    )


def _real(x: Tensor, mask: Tensor, past: int, seen: Tensor | None) -> Tensor:
    """Which of the new columns hold tokens, bool `[B, T]`, after a check of the mask."""
    batch, tokens = x.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise wrong("attention_mask", "a tensor [B, past + T] of 0 and 1", mask)
    if tuple(mask.shape) != (batch, past + tokens):
        raise wrong("attention_mask", f"shape [B, past + T] = [{batch}, {past} + {tokens}]", mask)
    if mask.device != x.device:
        raise wrong("attention_mask", f"device {x.device}", mask)
    real = mask != 0
    if values_are_checked(mask):
        if not bool(((mask == 1) | ~real).all()):
            raise wrong("attention_mask", "0 and 1", "other values")
        known = real[:, :past].sum(1)
        if seen is not None and not torch.equal(known, seen.to(known.dtype)):
            raise wrong(
                "attention_mask",
                f"{seen.tolist()} tokens in its first {past} columns, as the cache has seen",
                f"{known.tolist()}",
            )
        real = real[:, past:]
        # number of runs of adjacent tokens in each batch row
        blocks = real.sum(1) - (real[:, 1:] & real[:, :-1]).sum(1)
        if bool((blocks > 1).any()):
            raise wrong(
                "attention_mask",
                "no padding between tokens",
                f"some in batch row {int(blocks.argmax())}",
            )
        return real
    return real[:, past:]


def _check_positions(position_ids: Tensor, real: Tensor | None, seen: Tensor | None) -> None:
    """Checks that positions continue from the tokens seen in each batch row, one by one."""
    if not values_are_checked(position_ids):
        return
    if real is None:
        expected = torch.arange(position_ids.shape[1], device=position_ids.device).expand(
            position_ids.shape
        )
    else:
        expected = real.cumsum(1) - 1
    if seen is not None:
        expected = expected + seen[:, None]
    bad = position_ids != expected
    if real is not None:
        bad &= real
    if bool(bad.any()):
        b, column = (int(index) for index in bad.nonzero()[0])
        got = f"{int(position_ids[b, column])} in batch row {b}, column {column}"
        follows = f"{int(expected[b, column])}, which continues from the tokens seen"
        raise wrong("position_ids", follows, got)
