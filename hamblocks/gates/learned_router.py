"""A learned gate that does not look at the memory."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.heads import ScoreHeads, Split
from hamblocks.protocols import Built, GateOutput, LayerDims, MemoryTrace, check_count
from hamblocks_ops.arguments import wrong

GRADIENTS = ("bias", "straight_through")
"""How the gradient reaches the router."""


@final
class LearnedRouter(Built):
    r"""A learned gate that does not look at the memory: score = MLP(x), a logit.

    The score is the logit itself and not its sigmoid, which saturates: many tokens would then tie
    at 1 and no threshold could tell them apart. A probability of one half is a score of 0, so
    `Threshold(0.0)` stores the tokens whose probability is at least one half.

    Selection has no gradient. The MLP learns through the logit bias that is added to the attention
    logits of the token's key, in one of two ways:

    - `gradient="bias"`: the bias is \(\log \sigma(\text{logit})\), which multiplies the key's
      unnormalised attention weight by \(\sigma(\text{logit})\). The bias is part of the model: it
      stays at inference, and the cache stores it.
    - `gradient="straight_through"`: the bias is 0 for every key, and its gradient is that of
      \(\log \sigma(\text{logit})\) (Bengio et al., arXiv 1308.3432). The router decides only what
      is stored; attention to a stored key is unchanged, in training and at inference. The cache
      still stores the zeros, because either all keys of a layer have biases or none.

    In both cases only the keys that are stored give a gradient.
    """

    score_heads: ScoreHeads = "own"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __init__(self, width: int | None = None, *, gradient: str = "bias") -> None:
        """Stores the arguments; the MLP is made when a layer takes the gate.

        Args:
            width: width of the MLP's hidden layer, at least 1; None: a quarter of the layer's
                hidden size.
            gradient: "bias" or "straight_through".

        Raises:
            ValueError: `width` is not an integer of at least 1, or there is no such gradient.
        """
        super().__init__()
        if width is not None:
            width = check_count("width", width, 1)
        if gradient not in GRADIENTS:
            raise wrong("gradient", f"one of {', '.join(GRADIENTS)}", repr(gradient))
        self.width, self.gradient = width, gradient
        self.surrogate_gradient = gradient == "straight_through"

    def make(self, dims: LayerDims) -> None:
        """Makes the MLP."""
        width = self.width or max(dims.hidden_size // 4, 1)
        self.mlp = nn.Sequential(
            nn.Linear(dims.hidden_size, width), nn.SiLU(), nn.Linear(width, dims.num_kv_heads)
        )

    def split_heads(self, ranks: int) -> dict[str, Split]:
        """See `hamblocks.heads.SplitsHeads`: the last map has a row for every head."""
        assert self.dims is not None
        rows = Split(0, [self.dims.num_kv_heads])
        return {"mlp.2.weight": rows, "mlp.2.bias": rows}

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns score and logit bias, `[B, T, Hkv]`, float32 (or float64)."""
        logit: Tensor = self.mlp(x)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        bias = F.logsigmoid(logit)
        if self.gradient == "straight_through":
            bias = bias - bias.detach()
        return GateOutput(logit.detach(), bias)
