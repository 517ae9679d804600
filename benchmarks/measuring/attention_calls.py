"""Selected attention on a CPU, and attention over everything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Shape
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hamblocks.ops import select_threshold, selected_attention
from hamblocks_ops.packing import NEVER
from measuring import floors
from measuring.attend import Attend
from measuring.checks import SampledAttention
from measuring.clock import Contender
from measuring.visits import seen


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over everything, by torch."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def make(shape: Shape, run: str) -> dict[str, Callable[[], Contender]]:
    """The calls of a shape. Tokens are stored at random, each head its own."""
    sizes = 1, shape.tokens, shape.heads, shape.head_dim
    learns = run == "both"
    leaves = [torch.randn(sizes).requires_grad_(learns) for _ in range(3)]
    cotangent = torch.randn(sizes)
    few = select_threshold(torch.rand(sizes[:3]), 1 - shape.fraction)

    def contender(evict_at: Tensor, attend: Attend) -> Contender:
        def call() -> object:
            with torch.set_grad_enabled(learns):
                out = attend(*leaves)
            return torch.autograd.grad(out, leaves, cotangent) if learns else out

        pairs, kept = seen(evict_at)
        work = floors.attention(*sizes[1:], pairs=pairs, kept=kept, item=4, learns=learns)
        exact = SampledAttention(*leaves, evict_at, cotangent)
        return Contender({}, call, lambda: exact.check(attend, learns), work)

    def selected(impl: str) -> Attend:
        return lambda q, k, v: selected_attention(q, k, v, few, impl=impl).out

    return {
        "gather": lambda: contender(few, selected("gather")),
        "flex": lambda: contender(few, selected("flex")),
        "everything by SDPA": lambda: contender(torch.full_like(few, NEVER), sdpa),
    }
