"""Styles for `torch.distributed.tensor.parallel.parallelize_module`.

A file of its own, because importing these styles takes a second.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

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
class GatheredColumns(ColwiseParallel):
    """Each rank computes some outputs of an `nn.Linear`, and all of them are gathered.

    Torch's own style with output layout `Replicate` does the same, but cannot reshape what it
    computes of x `[B, 0, hidden]`: a rank of context parallel may have no token.
    """

    def __init__(self) -> None:
        """Makes the style."""
        super().__init__(output_layouts=Replicate())

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        sizes: list[int] = []

        def flatten(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            sizes[:] = inputs[0].shape[:-1]
            return inputs[0].reshape(-1, inputs[0].shape[-1])

        def unflatten(_: nn.Module, __: object, y: Tensor) -> Tensor:
            return y.reshape(*sizes, y.shape[-1])

        # x before torch's own hook makes a DTensor of it, and y after its hook has gathered it
        module.register_forward_pre_hook(flatten, prepend=True)
        module.register_forward_hook(unflatten)
        return module


@final
class Whole(ParallelStyle):
    """Each rank holds all of a module's own parameters, and computes the same as the others."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hold_whole(module, device_mesh, self.src_data_rank)
        return module
