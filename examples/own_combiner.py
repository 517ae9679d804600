"""A combiner of your own: one learned weight per head between both reads.

python examples/own_combiner.py    (needs `pip install '.[test]'` for the checks)
"""

import torch
from torch import Tensor, nn

import hamblocks as hb
from hamblocks.protocols import Built
from hamblocks.testing import check_combiner


class Lerp(Built):
    """y = W (a * attention_read + (1 - a) * memory_read), with a in (0, 1) per head."""

    def make(self, dims: hb.LayerDims) -> None:
        """Makes the parameters for a layer of these sizes."""
        self.weight = nn.Parameter(torch.zeros(dims.num_heads, 1))
        self.o_proj = nn.Linear(dims.num_heads * dims.head_dim, dims.hidden_size, bias=False)

    def forward(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        """Reads `[B, T, H, D]`, or None for a part that the layer lacks -> `[B, T, hidden]`."""
        if memory_read is None or attention_read is None:
            read = attention_read if memory_read is None else memory_read
        else:
            read = memory_read.lerp(attention_read, self.weight.sigmoid().to(x.dtype))
        return self.o_proj(read.flatten(2))


torch.manual_seed(0)
layer = hb.HAMLayer(64, 4, combiner=Lerp(), selector=hb.TopK(16) | hb.Window(8))
y, _, _ = layer(torch.randn(2, 100, 64))
y.square().mean().backward()
print(y.shape, "gradient of the weights:", layer.combiner.weight.grad.flatten())
results = check_combiner(Lerp(), seed=0)
print(sum(result.outcome == "pass" for result in results), "checks passed")
