"""Trains a byte-level decoder with plain torch, and draws what it stores.

python examples/plain_torch.py FILE    (needs `pip install '.[plot]'` for the picture)
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import hamblocks as hb
from hamblocks.plot import plot_kept

file, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
text = torch.tensor(list(file.read_bytes()))


def layer(_: int) -> hb.HAMLayer:
    """A quarter of the tokens for good, and the last 16."""
    selector = hb.Threshold(hb.TargetFraction(0.25)) | hb.Window(16)
    return hb.HAMLayer(64, 4, gate=hb.SharedGate(hb.PredictionError()), selector=selector)


torch.manual_seed(0)
model = hb.Decoder(vocab_size=256, num_layers=2, layer=layer)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
hb.hook_controllers(optimizer, model)  # each step moves the thresholds once
for step in range(steps):
    rows = text[torch.randint(len(text) - 129, (8, 1)) + torch.arange(129)]
    logits = model(rows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: {loss.item():.3f} nats")

model.eval()
with torch.no_grad():
    stats = model(text[None, :600]).stats
for number, one in enumerate(stats):
    print(f"layer {number}: {float(one.keep_fraction()):.0%} stored")
plot_kept(stats, [chr(byte) for byte in text[:600]]).savefig("kept.png", dpi=150)
print("Written: kept.png")
