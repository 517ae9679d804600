"""Parts that do nothing: a layer without a memory, or without attention."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from hamblocks.protocols import Trace
from hamblocks_ops.precision import wide


@final
class NoMemory:
    """Remembers nothing: reads zeros and is surprised by nothing, so that attention alone is left.

    HAMLayer(512, 8, memory=NoMemory(), gate=Periodic(1), selector=Threshold(-math.inf))
    """

    def __call__(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        state: tuple[()] | None = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, Trace, tuple[()]]:
        """See `hamblocks.protocols.Memory`; nothing was written, so residual and score are zero."""
        nothing = q.new_zeros(()).expand(q.shape)
        none = torch.zeros((), dtype=wide(q), device=q.device).expand(q.shape[:3])
        residual, score = (nothing, None) if metric is None else (None, none)
        trace = Trace(k=nothing, v=nothing, beta=none, residual=residual, score=score, position=position)
        return torch.zeros_like(q), trace, ()

    def __repr__(self) -> str:
        return "NoMemory()"


@final
class NoAttention:
    """Looks at nothing: reads zeros and leaves the cache as it is, so that the memory alone is left.

    HAMLayer(512, 8, attention=NoAttention(), selector=Threshold(math.inf))
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        evict_at: Tensor,
        *,
        position: Tensor,
        logit_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Any]:
        """See `hamblocks.protocols.Attention`."""
        return torch.zeros_like(q), cache

    def __repr__(self) -> str:
        return "NoAttention()"
