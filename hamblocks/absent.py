"""Parts that do nothing: a layer without a memory, or without attention."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from hamblocks.protocols import MemoryTrace
from hamblocks_ops import surprise
from hamblocks_ops.precision import wide


@final
class NoMemory:
    """Remembers nothing and predicts nothing: reads zeros, and all of a value is residual. Attention alone is left.

    HAMLayer(512, 8, memory=NoMemory(), gate=PeriodicGate(1), selector=Threshold(-math.inf))
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
    ) -> tuple[Tensor, MemoryTrace, tuple[()]]:
        """See `hamblocks.protocols.Memory`; keys and values are as they came."""
        if q.shape[2] != k.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        beta = torch.zeros((), dtype=wide(q), device=q.device).expand(q.shape[:3])
        score = None if metric is None else surprise(v.detach(), v.detach(), metric=metric)
        trace = MemoryTrace(
            k=k,
            v=v,
            beta=beta,
            residual=v if metric is None else None,
            score=score,
            position=position,
        )
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
