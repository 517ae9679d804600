"""Gates: how much a token deserves to be stored."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.protocols import (
    Built,
    Gate,
    GateOutput,
    LayerDims,
    MemoryTrace,
    check_count,
    check_part,
)
from hamblocks_ops.surprise import METRICS


@final
class PredictionError:
    """Surprise of the memory: a distance between its prediction and the value (arXiv 2603.22325).

    The layer reads `metric` and has the memory compute the score without writing the residual.
    """

    def __init__(self, metric: str = "cosine") -> None:
        """Metric: "cosine", "relative_l2" or "l2" (see `hamblocks.ops.surprise`)."""
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        self.metric = metric

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """The score that the memory computed, `[B, T, H]`."""
        if trace.score is None:
            raise ValueError(
                "trace: expected a score, got None (was the memory called with metric=gate.metric?)"
            )
        return GateOutput(trace.score)

    def __repr__(self) -> str:
        return f"PredictionError({self.metric!r})"


@final
class LearnedRouter(Built):
    """A learned gate that never looks at the memory: score = sigmoid(MLP(x)), one per key/value head.

    Its log is added to the attention logits of the key, which is how it learns: selection itself has no gradient.
    """

    def __init__(self, width: int | None = None) -> None:
        """Width of the hidden layer; None: a quarter of the hidden size."""
        super().__init__()
        if width is not None:
            check_count("width", width, 1)
        self.width = width

    def make(self, dims: LayerDims) -> None:
        """Makes the MLP."""
        width = self.width or max(dims.hidden_size // 4, 1)
        self.mlp = nn.Sequential(
            nn.Linear(dims.hidden_size, width), nn.SiLU(), nn.Linear(width, dims.num_kv_heads)
        )

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Score and logit bias, `[B, T, Hkv]`."""
        logit: Tensor = self.mlp(x)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return GateOutput(logit.detach().sigmoid(), F.logsigmoid(logit))


@final
class RandomGate:
    """The control experiment: a uniform score in [0, 1) that is a hash of seed, position and head.

    Position is all it knows of a token, so that prefill and decode agree and every sequence draws alike.
    """

    def __init__(self, seed: int = 0) -> None:
        """Layers that should draw differently need different seeds."""
        self.seed = seed

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Score `[B, T, H]`, float32."""
        heads = torch.arange(trace.k.shape[2], device=x.device)
        word = _mix(
            _mix(_mix(torch.full_like(heads, self.seed & 0xFFFFFFFF)) ^ heads)
            ^ trace.position.long()[..., None]
        )
        return GateOutput((word >> 8).to(torch.float32) * 2.0**-24)

    def __repr__(self) -> str:
        return f"RandomGate({self.seed})"


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words whose output bits look independent (MurmurHash3's finalizer), in int64."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)


@final
class PeriodicGate:
    """Scores every n-th token 1 and the others 0: with `Threshold(0.5)`, a stride of n."""

    def __init__(self, n: int, offset: int = 0) -> None:
        """The tokens at positions offset, offset + n, ... score 1."""
        check_count("n", n, 1)
        self.n, self.offset = n, offset

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Score `[B, T, 1]`, float32: the same for all heads."""
        return GateOutput(((trace.position - self.offset) % self.n == 0).float()[..., None])

    def __repr__(self) -> str:
        return f"PeriodicGate({self.n}, offset={self.offset})"


@final
class SharedGate(nn.Module):
    """One decision for the whole layer: another gate's score, and logit bias, averaged over heads."""

    def __init__(self, gate: Gate) -> None:
        """Gate: any gate; its parameters become this one's."""
        super().__init__()
        check_part("gate", gate)
        self.gate = gate
        if hasattr(gate, "metric"):
            self.metric = gate.metric

    def build(self, dims: LayerDims) -> None:
        """Builds the inner gate."""
        build: Any = getattr(self.gate, "build", None)
        if build is not None:
            build(dims)

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Score `[B, T, 1]`."""
        score, bias = self.gate(x, trace)
        return GateOutput(
            score.mean(-1, keepdim=True), None if bias is None else bias.mean(-1, keepdim=True)
        )
