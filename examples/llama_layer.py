"""Replaces two layers of a Llama; at first the model computes what it did.

python examples/llama_layer.py    (needs `pip install '.[hf]'`)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hamblocks as hb
from hamblocks.models import convert

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
llama = LlamaForCausalLM(
    LlamaConfig(vocab_size=500, num_attention_heads=4, num_key_value_heads=2, **sizes)
).eval()

# everything is stored until the threshold moves, and the memory's share of the output starts at 0
selector = hb.Threshold(hb.FixedThreshold(-torch.inf)) | hb.Window(16)
model = convert(llama, selector=selector, layers=[1, 3])
tokens = torch.randint(500, (2, 64))
with torch.no_grad():
    difference = (model(tokens).logits - llama(tokens).logits).abs().max()
print(f"largest difference of logits: {difference:.0e}")

for threshold in (-torch.inf, 0.5, 1.0, torch.inf):
    for layer in (1, 3):
        controller = model.model.stack.blocks[layer].block.layer.selector.left.controller
        controller.set_threshold(threshold)
    with torch.no_grad():
        stats = model(tokens).stats
    print(f"threshold {threshold:4}: {float(stats[1].keep_fraction()):.0%} stored in layer 1")
