"""A gate that is a sum of gates."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from hamblocks.heads import ScoreHeads
from hamblocks.protocols import (
    Buildable,
    Gate,
    GateOutput,
    HasMetric,
    LayerDims,
    MemoryTrace,
    check_part,
    reads_given,
    surrogate_gradient,
)
from hamblocks_ops.arguments import wrong


@final
class WeightedSum(nn.Module):
    r"""Adds the scores of several gates: \(\sum_i w_i \cdot \text{score}_i\).

    Gates score on scales of their own: `PredictionError("cosine")` in [0, 2], `PredictionEntropy`
    in [0, 1], `CommittedWrite` in the unit of the values, a `LearnedRouter` in logits. A weight
    says how much one unit of its gate counts, so choose the weights by these scales.

    The sum has as many heads as the term with the most. A term with one head counts for every
    head, and the score of a key/value head counts for each of its query heads. The logit biases of
    the terms are added without weights.

    If all gates have the same `metric`, it is also that of the sum. Otherwise the sum's is None,
    and the surprise of each gate is computed from the residual.
    """

    def __init__(self, gates: Sequence[Gate], weights: Sequence[float]) -> None:
        """Makes the gate.

        Args:
            gates: one or more gates. Their parameters become those of this gate.
            weights: a finite number for every gate.

        Raises:
            ValueError: there is no gate, one is not a gate, or the weights are not as many finite
                numbers as there are gates.
        """
        super().__init__()
        if not isinstance(gates, (list, tuple)) or not gates:
            raise wrong("gates", "a list of one or more gates", gates)
        for gate in gates:
            check_part("gates", gate)
        if not _are_numbers(weights) or len(weights) != len(gates):
            raise wrong("weights", f"a list of {len(gates)} finite numbers, one per gate", weights)
        self.weights = tuple(float(weight) for weight in weights)
        # attributes and not a list, so that modules are found and may be replaced
        for i, gate in enumerate(gates):
            setattr(self, f"gate_{i}", gate)
        metrics = [gate.metric for gate in gates if isinstance(gate, HasMetric)]
        if metrics:  # this attribute tells the layer that the sum needs a memory
            common = len(metrics) == len(gates) and len(set(metrics)) == 1
            self.metric = metrics[0] if common else None
        self.reads_given = any(reads_given(gate) for gate in gates)
        self.surrogate_gradient = any(surrogate_gradient(gate) for gate in gates)

    @property
    def gates(self) -> list[Gate]:
        """The gates, in the order of their weights."""
        return [getattr(self, f"gate_{i}") for i in range(len(self.weights))]

    @property
    def score_heads(self) -> ScoreHeads:
        """See `hamblocks.heads.HasScoreHeads`: those of the term with the most."""
        said = {getattr(gate, "score_heads", "own") for gate in self.gates}
        return "own" if "own" in said else "given" if "given" in said else "one"

    def build(self, dims: LayerDims) -> None:
        """Builds the gates that have parameters."""
        for gate in self.gates:
            if isinstance(gate, Buildable):
                gate.build(dims)

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, heads]`, and the logit bias `[B, T, Hkv]` or `[B, T, 1]`.

        Raises:
            ValueError: the number of heads of one term does not divide that of another.
        """
        outputs = [gate(x, trace.scored_for(gate)) for gate in self.gates]
        heads = max(output.score.shape[2] for output in outputs)
        total: Tensor | None = None
        bias: Tensor | None = None
        for weight, output in zip(self.weights, outputs, strict=True):
            term = weight * _with_heads(output.score, heads)
            total = term if total is None else total + term
            if output.logit_bias is not None:
                bias = output.logit_bias if bias is None else bias + output.logit_bias
        assert total is not None  # there is at least one gate
        return GateOutput(total, bias)


def _are_numbers(weights: object) -> bool:
    return isinstance(weights, (list, tuple)) and all(
        isinstance(weight, numbers.Real) and not isinstance(weight, bool) and math.isfinite(weight)
        for weight in weights
    )


def _with_heads(score: Tensor, heads: int) -> Tensor:
    """A score `[B, T, n]` as `[B, T, heads]`, detached, float32 or wider."""
    score = score.detach()
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    own = score.shape[2]
    if own == heads:
        return score
    if own < 1 or heads % own:
        raise wrong("gates", f"scores whose heads divide the {heads} of another", f"{own} heads")
    return score.repeat_interleave(heads // own, 2)
