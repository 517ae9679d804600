"""Jobs of torchtitan, by name: `--module hamblocks.titan --config ham_debugmodel`."""

from __future__ import annotations

from typing import Any

from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.trainer import Trainer

from hamblocks.titan.checkpoints import HAMCheckpointManager
from hamblocks.titan.metrics import HAMMetrics
from hamblocks.titan.spec import model_spec
from hamblocks.titan.text_bytes import VOCAB, ByteDataLoader, ByteTokenizer

LLAMA3_VOCAB = 128_256
LLAMA3_TOKENIZER = "./assets/hf/Llama-3.1-8B"

GATE = {"type": "shared_gate", "gate": {"type": "prediction_error"}}
"""One decision for all heads of a layer, as docs/routing.md recommends."""


def _job(ham: dict[str, Any], flavor: str, learning_rate: float, **options: Any) -> Trainer.Config:
    """A job, with what all jobs have in common."""
    return Trainer.Config(
        model_spec=model_spec(flavor, gate=GATE, **ham),
        loss=CrossEntropyLoss.Config(global_vocab_size=ham["vocab_size"]),
        optimizer=default_adamw(lr=learning_rate),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        **options,
    )


def ham_debugmodel() -> Trainer.Config:
    """Two small layers on the bytes of Python's own library: nothing is downloaded."""
    return _job(
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "debugmodel",
        2e-3,
        hf_assets_path=".",
        tokenizer=ByteTokenizer.Config(),
        dataloader=ByteDataLoader.Config(),
        training=TrainingConfig(
            local_batch_size=4, seq_len=256, steps=20, disable_cuda_graphs=True
        ),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        metrics=HAMMetrics.Config(log_freq=1),
        checkpoint=HAMCheckpointManager.Config(interval=10),
        activation_checkpoint=None,
    )


def _pretraining(ham: dict[str, Any], flavor: str, rate: float, batch: int) -> Trainer.Config:
    """A job on C4 with the tokenizer of Llama 3, as torchtitan's own jobs."""
    return _job(
        {"vocab_size": LLAMA3_VOCAB, **ham},
        flavor,
        rate,
        hf_assets_path=LLAMA3_TOKENIZER,
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        training=TrainingConfig(
            local_batch_size=batch, seq_len=4096, steps=20_000, disable_cuda_graphs=True
        ),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1000),
        metrics=HAMMetrics.Config(log_freq=10, enable_tensorboard=True),
        checkpoint=HAMCheckpointManager.Config(interval=500),
        activation_checkpoint=FullAC.Config(),
    )


def ham_400m() -> Trainer.Config:
    """20 layers of width 1,024, with 8 heads of 128."""
    ham = {"hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 8}
    return _pretraining(ham, "400M", 6e-4, 8)


def ham_1b() -> Trainer.Config:
    """16 layers of width 2,048, with 16 heads of 128."""
    ham = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16}
    return _pretraining(ham, "1B", 3e-4, 4)
