"""A memory of your own: linear attention, written once per sequence.

python examples/own_memory.py    (needs `pip install '.[test]'` for the checks)
"""

from typing import Any

import torch
from torch.nn.functional import normalize

import hamblocks as hb
from hamblocks.ops import surprise
from hamblocks.testing import check_memory


class LinearAttention:
    """S_t = S_{t-1} + k_t v_t^T; it reads S_t^T q_t and predicts S_{t-1}^T k_t."""

    def __call__(
        self, x: Any, q: Any, k: Any, v: Any, *, position, state=None, cu_seqlens=None, metric=None
    ) -> Any:
        """See `hamblocks.protocols.Memory`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = normalize(q.to(wide), dim=-1), normalize(k.to(wide), dim=-1), v.to(wide)
        k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], 2) for y in (k, v))
        (read, residual), state = hb.per_sequence(
            self.run, q, k, v, cu_seqlens=cu_seqlens, state=state
        )
        score = None
        if metric is not None:
            score, residual = surprise(residual.detach(), v.detach(), metric=metric), None
        beta = torch.ones_like(v[..., 0])
        return read.to(x.dtype), hb.MemoryTrace(k, v, beta, residual, score, position), state

    def run(self, q: Any, k: Any, v: Any, state: Any) -> Any:
        """Whole sequences `[B, T, H, D]`."""
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if state is None:
            state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
        read = q @ state + (q @ k.mT).tril() @ v
        residual = v - k @ state - (k @ k.mT).tril(-1) @ v
        return (read.transpose(1, 2), residual.transpose(1, 2)), state + k.mT @ v


torch.manual_seed(0)
layer = hb.HAMLayer(64, 4, memory=LinearAttention(), selector=hb.TopK(16) | hb.Window(8))
y, _, stats = layer(torch.randn(2, 100, 64))
print(y.shape, f"{float(stats.keep_fraction()):.0%} stored")
results = check_memory(LinearAttention(), seed=0)
print(sum(result.outcome == "pass" for result in results), "checks passed")
