"""A gate of your own: stores what the memory has to write much of, and is tested by the kit.

python examples/own_gate.py    (needs `pip install '.[test]'` for the checks)
"""

import torch

import hamblocks as hb
from hamblocks.testing import check_gate


class WrittenNorm:
    """Scores a token by what the memory writes for it: beta times the norm of the residual."""

    def __call__(self, x: torch.Tensor, trace: hb.MemoryTrace) -> hb.GateOutput:
        """x `[B, T, hidden]` -> score `[B, T, H]`."""
        return hb.GateOutput(trace.beta * trace.residual.to(trace.beta.dtype).norm(dim=-1))


torch.manual_seed(0)
layer = hb.HAMLayer(64, 4, gate=WrittenNorm(), selector=hb.TopK(16) | hb.Window(8))
y, _, stats = layer(torch.randn(2, 100, 64))
print(y.shape, f"{float(stats.keep_fraction()):.0%} stored")
results = check_gate(WrittenNorm(), seed=0)
print(sum(result.outcome == "pass" for result in results), "checks passed")
