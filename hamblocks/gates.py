"""Gates: they score how much a token deserves to be stored."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.protocols import (
    Buildable,
    Built,
    Gate,
    GateOutput,
    HasMetric,
    LayerDims,
    MemoryTrace,
    check_count,
    check_part,
)
from hamblocks_ops.arguments import wrong
from hamblocks_ops.surprise import METRICS


@final
class PredictionError:
    """Scores a token by the distance between its value and the memory's prediction of it.

    This is the gate of the HAM paper (arXiv 2603.22325). The layer passes `metric` to the memory,
    which computes the score and need not write the residual.
    """

    def __init__(self, metric: str = "cosine") -> None:
        """Makes the gate.

        Args:
            metric: "cosine", "relative_l2" or "l2" (see `hamblocks.ops.surprise`).

        Raises:
            ValueError: there is no such metric.
        """
        if metric not in METRICS:
            raise wrong("metric", f"one of {', '.join(METRICS)}", repr(metric))
        self.metric = metric

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns `trace.surprise(metric)`, `[B, T, H]`, float32 (or float64).

        Raises:
            ValueError: the layer has no memory, or the trace has neither the residual nor the score
                of this metric.
        """
        if trace.beta is None:  # the trace of a layer without a memory
            raise wrong(
                "gate",
                "a gate that reads no prediction, for a layer without a memory "
                "(such as RandomGate, PeriodicGate or LearnedRouter)",
                f"{self!r}, which needs a memory",
            )
        return GateOutput(trace.surprise(self.metric))

    def __repr__(self) -> str:
        return f"PredictionError({self.metric!r})"


@final
class LearnedRouter(Built):
    """A learned gate that does not look at the memory: score = sigmoid(MLP(x)).

    Selection has no gradient. The log of the score is therefore added to the attention logits of
    the key, and the MLP learns through this logit bias.
    """

    def __init__(self, width: int | None = None) -> None:
        """Makes the gate; the layer that owns it makes the MLP.

        Args:
            width: width of the MLP's hidden layer, at least 1; None: a quarter of the layer's
                hidden size.

        Raises:
            ValueError: `width` is not an integer of at least 1.
        """
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
        """Returns score and logit bias, `[B, T, Hkv]`, float32 (or float64)."""
        logit: Tensor = self.mlp(x)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return GateOutput(logit.detach().sigmoid(), F.logsigmoid(logit))


@final
class RandomGate:
    """The control experiment: a score that is uniform in [0, 1) and independent of the token.

    The score is a hash of seed, position and head. One pass and any division into pieces therefore
    draw the same scores, and so do all sequences of a batch.
    """

    def __init__(self, seed: int = 0) -> None:
        """Makes the gate.

        Args:
            seed: its lowest 32 bits count. Layers with the same seed draw the same scores.
        """
        self.seed = seed

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, H]`, float32."""
        # the keys tell the number of heads; a layer without a memory has them too
        heads = torch.arange(trace.k.shape[2], device=x.device)
        word = _mix(
            _mix(_mix(torch.full_like(heads, self.seed & 0xFFFFFFFF)) ^ heads)
            ^ trace.position.long()[..., None]
        )
        # float32 holds 24 bits exactly
        return GateOutput((word >> 8).to(torch.float32) * 2.0**-24)

    def __repr__(self) -> str:
        return f"RandomGate({self.seed})"


def _mix(word: Tensor) -> Tensor:
    """Mixes the bits of 32-bit words, held in int64: the finalizer of MurmurHash3, a bijection."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)


@final
class PeriodicGate:
    """Scores every n-th token 1 and the others 0; `Threshold(0.5)` then stores a stride of n."""

    def __init__(self, n: int, offset: int = 0) -> None:
        """Makes the gate.

        Args:
            n: tokens from one that scores 1 to the next, at least 1.
            offset: any position that scores 1; so do those that are a multiple of `n` away.

        Raises:
            ValueError: `n` is not an integer of at least 1.
        """
        check_count("n", n, 1)
        self.n, self.offset = n, offset

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, 1]`, float32, the same for all heads."""
        return GateOutput(((trace.position - self.offset) % self.n == 0).float()[..., None])

    def __repr__(self) -> str:
        return f"PeriodicGate({self.n}, offset={self.offset})"


@final
class SharedGate(nn.Module):
    """Averages the score and the logit bias of another gate over heads.

    The layer then takes one decision for all of its heads.
    """

    def __init__(self, gate: Gate) -> None:
        """Makes the gate.

        Args:
            gate: any gate. Its parameters and its `metric` become those of this gate.

        Raises:
            ValueError: `gate` is not a gate.
        """
        super().__init__()
        check_part("gate", gate)
        self.gate = gate
        if isinstance(gate, HasMetric):
            self.metric = gate.metric

    def build(self, dims: LayerDims) -> None:
        """Builds the inner gate, if it has parameters."""
        if isinstance(self.gate, Buildable):
            self.gate.build(dims)

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns score and logit bias, `[B, T, 1]`."""
        score, bias = self.gate(x, trace)
        return GateOutput(
            score.mean(-1, keepdim=True), None if bias is None else bias.mean(-1, keepdim=True)
        )
