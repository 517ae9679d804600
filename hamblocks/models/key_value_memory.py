"""A delta-rule memory without weights, over the keys and values that a model's attention has."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.controllers.tau import number
from hamblocks.protocols import LayerDims, MemoryTrace
from hamblocks_ops import gated_delta_rule
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide


class KeyValueMemoryState(NamedTuple):
    """State of a `KeyValueMemory`.

    Attributes:
        recurrent: `[N, Hkv, D, D]`, float32 or wider.
    """

    recurrent: Tensor


@final
class KeyValueMemory(nn.Module):
    """The delta rule over the keys and values of attention, to score tokens in a model without one.

    Every key/value head writes its value under its key, scaled to unit length, with one write
    strength and one decay for all tokens. Nothing is trained. In a model with rotary positions the
    keys are rotated, so the memory predicts a value from keys at the same angle best.
    """

    own_projections = True
    """The keys and values are columns of x (see `hamblocks.models.attach_policy`)."""
    state_type = KeyValueMemoryState

    def __init__(self, beta: float = 0.5, decay: float = 0.0) -> None:
        """Makes the part.

        Args:
            beta: write strength, in (0, 1].
            decay: what the logarithm of the state loses per token, at least 0; 0: no decay.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        if not 0 < number("beta", beta) <= 1:
            raise wrong("beta", "a number in (0, 1]", beta)
        if not 0 <= number("decay", decay) < float("inf"):
            raise wrong("decay", "a number >= 0", decay)
        self.beta, self.decay = float(beta), float(decay)
        self.begin: int | None = None
        self.size: tuple[int, int] | None = None

    def place(self, begin: int) -> None:
        """Says at which column of x the keys begin; the values follow them."""
        self.begin = begin

    def read_size(self, dims: LayerDims) -> tuple[int, int]:
        """Key/value heads and their size."""
        self.size = dims.num_kv_heads, dims.head_dim
        return self.size

    def forward(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        *,
        position: Tensor,
        state: KeyValueMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, MemoryTrace, KeyValueMemoryState]:
        """See `hamblocks.protocols.Memory`."""
        if self.begin is None or self.size is None:
            raise wrong("memory", "a layer of attach_policy around KeyValueMemory", "another")
        width = self.size[0] * self.size[1]
        columns = x[..., self.begin : self.begin + 2 * width].detach()
        k, v = (part.unflatten(-1, self.size) for part in columns.split(width, -1))
        k = F.normalize(k.to(wide(k)), dim=-1).to(x.dtype)
        beta = torch.full(k.shape[:3], self.beta, dtype=wide(x), device=x.device)
        result = gated_delta_rule(
            k,
            k,
            v.contiguous(),
            beta=beta,
            g=None if self.decay == 0 else torch.full_like(beta, -self.decay),
            initial_state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            output_residual=metric is None,
            metric=metric,
        )
        trace = MemoryTrace(k, v, beta, result.residual, result.score, position, metric=metric)
        return result.out, trace, KeyValueMemoryState(result.final_state)
