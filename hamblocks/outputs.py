"""Types of what `HAMLayer.forward` and `HAMLayer.explain` return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks.state import HAMState
from hamblocks_ops import Explanation
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import sequence_of


class LayerStats(NamedTuple):
    """Scores and lifetimes of the tokens of a call.

    Attributes:
        score: `[B, T, Hkv or 1]`, the scores that the selector got; None in a layer without
            attention.
        evict_at: int32, same shape, lifetimes at the end of the call; None in a layer without
            attention.
        position: int32 `[B, T]`, position of each token within its sequence.
        cu_seqlens: int32 `[N+1]`, or None.
        reads: bool `[B, T]`, the queries that the query gate lets read; None without one.
        last: int32 `[B, T]`, position of the last token of each token's sequence, where the call
            holds slices of sequences; None: the last one of the call.
    """

    score: Tensor | None
    evict_at: Tensor | None
    position: Tensor
    cu_seqlens: Tensor | None
    reads: Tensor | None = None
    last: Tensor | None = None

    def keep_fraction(self, by: str | None = None) -> Tensor:
        """Fraction of the call's tokens that are stored at its end.

        Args:
            by: "head": a fraction for every head that decides, float32 `[Hkv or 1]`; None: one for
                all, float32 `[]`.

        Returns:
            The fraction; 0 if there are no tokens. For a layer without attention 0, and `[1]` with
            `by="head"`.

        Raises:
            ValueError: there is no such `by`.
        """
        if by not in (None, "head"):
            raise wrong("by", "None or head", repr(by))
        heads = 1 if self.evict_at is None else self.evict_at.shape[2]
        if self.evict_at is None or self.position.numel() == 0:
            none = torch.zeros(heads, dtype=torch.float32, device=self.position.device)
            return none if by else none.sum()
        stored = self.is_stored().float()
        return stored.mean((0, 1)) if by else stored.mean()

    def is_stored(self) -> Tensor:
        """Whether each token is stored at the end of the call, bool `[B, T, Hkv or 1]`.

        Raises:
            ValueError: the layer has no attention, so it decides nothing.
        """
        if self.evict_at is None:
            raise wrong("stats", "those of a layer with attention", "those of a memory alone")
        if self.last is not None:
            last = self.last
        elif self.cu_seqlens is None:
            last = self.position[:, -1:]
        else:
            sequence = sequence_of(self.cu_seqlens, self.position.shape[1])
            last = self.position[:, self.cu_seqlens.long()[1:][sequence] - 1]
        return self.evict_at > last[..., None]


class LayerOutput(NamedTuple):
    """Result of a layer.

    Attributes:
        y: `[B, T, hidden_size]`, dtype of x.
        state: for the next call; None unless a state was given.
        stats: scores and lifetimes of the tokens.
    """

    y: Tensor
    state: HAMState | None
    stats: LayerStats


class LayerExplanation(dict[str, Explanation]):
    """For each op, which implementations can run a call of a layer; see `HAMLayer.explain`.

    Attributes:
        call: description of the call.
        parts: class name of each part of the layer, by kind.
    """

    def __init__(self, answers: dict[str, Explanation], call: str, parts: dict[str, str]) -> None:
        super().__init__(answers)
        self.call, self.parts = call, parts

    @property
    def chosen(self) -> dict[str, str | None]:
        """For each op, the implementation that "auto" takes; None if none can run the call."""
        return {op: answers.chosen for op, answers in self.items()}

    def __str__(self) -> str:
        lines = [self.call, *(f"{kind}: {name}" for kind, name in self.parts.items())]
        for op, answers in self.items():
            lines.append(f"op {op}: {answers.chosen or 'nothing'}")
            lines += [f"    {name}: {answer}" for name, answer in answers.items()]
        return "\n".join(lines)
