"""A short number that tells whether two models are the same, for runs that go on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

OF_THE_FILE = ("architectures", "dtype", "transformers_version")
"""Fields of a configuration that differ between a model and the same one after loading."""


def fingerprint(model: nn.Module, learned: Iterable[Tensor] = ()) -> str:
    """A checksum of the configuration and the weights of a model, 8 hexadecimal digits.

    Args:
        model: a model of transformers, with its weights in memory.
        learned: tensors of its state dict that do not count.
    """
    config: Any = model.config
    stated = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and name not in OF_THE_FILE
    }
    found = zlib.crc32(json.dumps(stated, sort_keys=True, default=str).encode())
    left_out = {weight.data_ptr() for weight in learned}
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in left_out:
            found = zlib.crc32(name.encode(), found)
            bits = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found = zlib.crc32(bits.numpy(), found)
    return f"{found:08x}"
