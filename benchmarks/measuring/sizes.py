"""The sizes that are measured on a GPU, and small ones to try the script on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Of everything that is measured."""

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

    @property
    def gpu(self) -> bool:
        """Whether there is a device with kernels to compare."""
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
)
