"""Sizes of the launches of the kernels, by compute capability and padded head size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops.selected_attention.triton.keys import padded_dim


class Config(NamedTuple):
    """Sizes of a launch: queries and keys of a tile, warps, stages of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


SM80 = {
    64: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(32, 64, 4, 2)),
    128: (Config(128, 32, 8, 3), Config(128, 32, 8, 2), Config(32, 64, 4, 2)),
    256: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2)),
}
SM90 = {
    64: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    128: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 128, 8, 2)),
    256: (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 8, 1)),
}
SM100 = {
    64: (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2)),
    128: (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 128, 8, 2)),
    256: (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 8, 1)),
}
"""Launches of forward, gradient of q, and gradients of k and v, by padded head size. They are
chosen so that no warps compute the same tile, and that the compiled kernels spill no register up to
128, and next to none at 256 (docs: Kernels). No GPU has timed them yet."""
WITH_BIAS_OR_GROUPS = {
    (8, 128): {2: Config(32, 64, 4, 1)},
    (9, 64): {2: Config(64, 128, 8, 2)},
    (9, 128): {1: Config(128, 32, 8, 2), 2: Config(32, 128, 8, 2)},
    (10, 64): {2: Config(64, 64, 8, 1)},
    (10, 128): {2: Config(64, 64, 4, 1)},
}
"""Launches that a bias or grouped queries would make spill, by major compute capability and padded
head size: for the number of a kernel in the tuple above, the launch that takes its place."""
FLOAT32 = (Config(32, 32, 4, 1),) * 3
"""float32 inputs: `tl.dot` runs on CUDA cores, so small tiles are faster."""


def configs(
    width: int, dtype: torch.dtype, major: int, *, loaded: bool = False
) -> tuple[Config, Config, Config]:
    """Launches of the three kernels.

    Args:
        width: the padded head size.
        dtype: of q.
        major: the major compute capability.
        loaded: whether there is a bias, or several query heads read one key head.
    """
    if dtype == torch.float32:
        return FLOAT32
    # chips between two of the tables take the older one, newer chips the newest
    chip, width = 10 if major >= 10 else 9 if major == 9 else 8, max(width, 64)
    table = {8: SM80, 9: SM90, 10: SM100}[chip][width]
    instead = WITH_BIAS_OR_GROUPS.get((chip, width), {}) if loaded else {}
    first, second, third = (instead.get(place, one) for place, one in enumerate(table))
    return first, second, third


def configs_of(q: Tensor, k: Tensor, logit_bias: Tensor | None) -> tuple[Config, Config, Config]:
    """Launches for a call.

    The interpreter takes those of SM90: sizes do not change results there.
    """
    major = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 9
    return configs(
        padded_dim(q.shape[3]),
        q.dtype,
        major,
        loaded=logit_bias is not None or q.shape[2] != k.shape[2],
    )
