"""A controller of your own: the threshold rises over the first steps of training.

python examples/own_controller.py    (needs `pip install '.[test]'` for the checks)
"""

import torch
from torch import Tensor

import hamblocks as hb
from hamblocks.testing import check_controller


class LinearSchedule(torch.nn.Module):
    """tau goes from `begin` to `end` in `steps` optimizer steps."""

    def __init__(self, begin: float, end: float, steps: int) -> None:
        super().__init__()
        self.begin, self.end, self.steps = begin, end, steps
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.counted = torch.zeros((), dtype=torch.bool)  # no buffer: it is not saved

    def forward(self, score: Tensor) -> Tensor:
        """score `[B, T, H]`, NaN for padding -> tau, float32 `[]`."""
        if self.training:
            self.counted = self.counted.to(score.device).logical_or(~score.isnan().all())
        progress = (self.taken.float() / self.steps).clamp(max=1)
        return self.begin + (self.end - self.begin) * progress

    def step(self) -> None:
        """Counts an optimizer step, if a forward pass saw scores."""
        if self.training:
            self.taken += self.counted
            self.counted.zero_()


torch.manual_seed(0)
layer = hb.HAMLayer(64, 4, selector=hb.Threshold(LinearSchedule(0.0, 1.2, 6)) | hb.Window(8))
optimizer = torch.optim.AdamW(layer.parameters())
hb.hook_controllers(optimizer, layer)
for step in range(7):
    y, _, stats = layer(torch.randn(2, 100, 64))
    y.square().mean().backward()
    optimizer.step()
    print(f"step {step}: {float(stats.keep_fraction()):.0%} stored")
results = check_controller(LinearSchedule(0.0, 0.8, 4), seed=0)
print(sum(result.outcome == "pass" for result in results), "checks passed")
