"""Trains a small model on the bytes of a file with the Trainer of transformers.

python examples/trainer.py FILE    (needs `pip install '.[hf]'`; any text file)
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import hamblocks as hb
from hamblocks.models import ControllerCallback, HAMConfig, HAMForCausalLM

text = torch.tensor(list(Path(sys.argv[1]).read_bytes()))
pieces = text[: len(text) // 129 * 129].view(-1, 129)
data = [{"input_ids": piece, "labels": piece} for piece in pieces]

torch.manual_seed(0)
config = HAMConfig(
    vocab_size=256,
    hidden_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    selector=hb.Threshold(hb.TargetFraction(0.25)) | hb.Window(16),
)
model = HAMForCausalLM(config)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 100,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    # the callback moves the thresholds after every step; without it everything is stored
    callbacks = [ControllerCallback()]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    model.save_pretrained(folder)
    model = HAMForCausalLM.from_pretrained(folder).eval()

with torch.no_grad():
    stats = model(text[None, :512]).stats
print("stored at the end:", [f"{float(one.keep_fraction()):.0%}" for one in stats])
