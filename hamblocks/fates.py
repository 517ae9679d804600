"""What layers decided about the tokens of one sequence, for pictures and tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks.outputs import LayerStats
from hamblocks_ops import NEVER
from hamblocks_ops.arguments import wrong


class Fates(NamedTuple):
    """Decisions about the T tokens of a sequence, by every head that decides.

    The heads of the first layer come first. Tensors are on the CPU.

    Attributes:
        score: float32 `[T, rows]`.
        evict_at: int64 `[T, rows]`; `NEVER` for a token that is stored for good.
        position: int64 `[T]`.
        rows: (layer, head) of every column; layers are counted as they were given.
    """

    score: Tensor
    evict_at: Tensor
    position: Tensor
    rows: list[tuple[int, int]]

    @property
    def is_kept(self) -> Tensor:
        """Whether a token is stored for good, bool `[T, rows]`."""
        return self.evict_at == NEVER

    @property
    def is_stored(self) -> Tensor:
        """Whether a token is stored at the end, bool `[T, rows]`."""
        return self.evict_at > self.position[-1:, None]

    def stored_after(self) -> Tensor:
        """Tokens stored after each token, int64 `[T, rows]`.

        The token at position t stores its own key before it reads, and a token leaves when the
        query at `evict_at` reads: after position t those are stored with `evict_at > t`.
        """
        tokens = len(self.position)
        begin = int(self.position[0]) if tokens else 0
        lasts = (self.evict_at - begin).clamp(0, tokens)
        comes = torch.arange(tokens)[:, None].expand_as(lasts)
        change = torch.zeros(tokens + 1, len(self.rows), dtype=torch.int64)
        lives = (lasts > comes).long()
        change.scatter_add_(0, comes, lives)
        change.scatter_add_(0, torch.where(lives > 0, lasts, tokens), -lives)
        return change[:tokens].cumsum(0)


def fates_of(stats: LayerStats | Iterable[LayerStats | None], sequence: int = 0) -> Fates:
    """The decisions of one or several layers about one sequence.

    Args:
        stats: of a layer, or of several layers for the same tokens, as `Decoder` and
            `HAMForCausalLM` return them. Layers without attention (and None) are left out, but
            counted.
        sequence: which one: a batch row, or a sequence of a packed batch.

    Raises:
        ValueError: no layer has attention, the layers saw different tokens, or there is no such
            sequence.
    """
    given = [stats] if isinstance(stats, LayerStats) else list(stats)
    rows: list[tuple[int, int]] = []
    scores, ends, positions = [], [], []
    for layer, one in enumerate(given):
        if one is None or one.evict_at is None:
            continue
        assert one.score is not None
        row, tokens = _place(one, sequence)
        scores.append(one.score.detach()[row, tokens].float().cpu())
        ends.append(one.evict_at.detach()[row, tokens].long().cpu())
        positions.append(one.position.detach()[row, tokens].long().cpu())
        rows += [(layer, head) for head in range(one.evict_at.shape[2])]
    if not rows:
        raise wrong("stats", "those of a layer with attention", "none")
    if any(not torch.equal(one, positions[0]) for one in positions):
        raise wrong("stats", "layers that saw the same tokens", "others")
    wide = [
        score.expand(-1, end.shape[1]) for score, end in zip(scores, ends, strict=True)
    ]  # a shared score has one head, whatever a selector of own heads makes of it
    return Fates(torch.cat(wide, 1), torch.cat(ends, 1), positions[0], rows)


def _place(stats: LayerStats, sequence: int) -> tuple[int, slice]:
    """The batch row and the tokens of a sequence."""
    cu_seqlens = stats.cu_seqlens
    count = stats.position.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if not 0 <= sequence < count:
        raise wrong("sequence", f"a number in [0, {count})", str(sequence))
    if cu_seqlens is None:
        return sequence, slice(None)
    begin, end = cu_seqlens[sequence : sequence + 2].tolist()
    return 0, slice(begin, end)
