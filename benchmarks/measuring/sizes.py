"""The sizes that are measured on a GPU, and small ones to try the script on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Sizes of everything that is measured.

    Attributes:
        device: "cuda", or "cpu" to try the script.
        dtype: dtype of inputs and weights.
        hidden: hidden size of a layer.
        heads: heads of an op and of a layer.
        head_dim: size of a head.
        op_tokens: sequence lengths of the ops.
        layer_tokens: sequence lengths of the layer.
        contexts: tokens before those that are decoded.
        decode_batch: sequences that are decoded together.
        decode_piece: tokens per prefill call.
        matmul: side of the square product that measures the rate of operations.
        copied_bytes: size of the copy that measures the rate of bytes.
        backend: of `torch.compile`.
        smoke_tokens: sequence length of the part `smoke`.
        traces: folder of its profiler trace; None: it writes none.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 2048
    heads: int = 16
    head_dim: int = 128
    op_tokens: tuple[int, ...] = (16384, 65536)
    layer_tokens: tuple[int, ...] = (8192, 16384, 32768, 65536)
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    decode_batch: int = 8
    decode_piece: int = 4096
    matmul: int = 8192
    copied_bytes: int = 2**30
    backend: str = "inductor"
    smoke_tokens: int = 1024
    traces: Path | None = None

    @property
    def gpu(self) -> bool:
        """Whether the device has kernels to compare."""
        return self.device == "cuda"


SMALL = Sizes(
    device="cpu",
    dtype=torch.float32,
    hidden=64,
    heads=4,
    head_dim=16,
    op_tokens=(192,),
    layer_tokens=(128,),
    contexts=(256,),
    decode_batch=2,
    decode_piece=64,
    matmul=256,
    copied_bytes=2**24,
    backend="aot_eager",
    smoke_tokens=16,
)
