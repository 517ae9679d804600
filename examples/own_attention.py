"""An attention part of your own: soft-capped logits over the stored tokens, as in Gemma 2.

python examples/own_attention.py    (needs `pip install '.[test]'` for the checks)
"""

import torch

import hamblocks as hb
from hamblocks.testing import check_attention


class SoftCapped:
    """Logits within +-cap."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, q: torch.Tensor, keys: hb.Keys) -> torch.Tensor:
        """q `[B, T, H, D]` -> read `[B, T, H, D]`."""
        dense = keys.dense()  # the keys as tensors, whether they stand in pages or not
        return dense.read(dense.softmax(self.cap * torch.tanh(dense.logits(q) / self.cap)))


torch.manual_seed(0)
selector = hb.TopK(16) | hb.Window(8)
layer = hb.HAMLayer(64, 4, num_kv_heads=2, attention=SoftCapped(30.0), selector=selector).eval()
x = torch.randn(2, 100, 64)
with torch.no_grad():
    whole = layer(x).y
    _, state, _ = layer.prefill(x[:, :99])
    last, state, _ = layer.decode(x[:, 99], state)
print(f"decoding differs by {float((last - whole[:, -1]).abs().max()):.0e}")
results = check_attention(SoftCapped(30.0), seed=0)
print(sum(result.outcome == "pass" for result in results), "checks passed")
