"""Styles for `torch.distributed.tensor.parallel.parallelize_module`.

A file of its own, because importing these styles takes a second.
"""

from __future__ import annotations

from typing import final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from hamblocks.parallel.heads import hold_whole, split_module


@final
class HeadParallel(ParallelStyle):
    """Each rank holds some heads of a `HAMLayer`, or some channels of a `SwiGLU`.

    x and y are plain tensors, equal on all ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_module(module, device_mesh, self.src_data_rank)
        return module


@final
class Whole(ParallelStyle):
    """Each rank holds all of a module's own parameters, and computes the same as the others."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hold_whole(module, device_mesh, self.src_data_rank)
        return module
