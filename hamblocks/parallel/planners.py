"""Planners of `torch.distributed.checkpoint` for models whose heads are split (`split_heads`).

A rank of a tensor-parallel `SwiGLU` holds rows of two blocks of one weight, its gate and its up
projection. PyTorch's planners expect one block per rank, and refuse to save the weight. These
planners save and load every block separately. The checkpoint has the whole weight under its own
name, so that PyTorch's planners load it into a model that is not split.

    dcp.save(state, checkpoint_id=folder, planner=SplitSavePlanner())
    dcp.load(state, checkpoint_id=folder, planner=SplitLoadPlanner())

They are a module of their own, because importing them takes a second.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import Shard, _StridedShard


@final
class SplitSavePlanner(DefaultSavePlanner):
    """Saves every block that a rank holds separately."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        """See `torch.distributed.checkpoint.SavePlanner`."""
        super().set_up_planner(state_dict, *args, **kwargs)
        self.state_dict = {name: in_blocks(x) for name, x in self.state_dict.items()}


@final
class SplitLoadPlanner(DefaultLoadPlanner):
    """Loads every block that a rank holds separately, in place."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        """See `torch.distributed.checkpoint.LoadPlanner`."""
        super().set_up_planner(state_dict, *args, **kwargs)
        self.state_dict = {name: in_blocks(x) for name, x in self.state_dict.items()}


def in_blocks(x: Any) -> Any:
    """x as a DTensor of `LocalShardsWrapper`, one shard per block; x itself for a single block.

    Args:
        x: an entry of a state dict. The blocks share the memory of a DTensor.
    """
    if not isinstance(x, DTensor) or x.device_mesh.get_coordinate() is None:
        return x
    if not any(isinstance(placement, _StridedShard) for placement in x.placements):
        return x
    runs = [_runs(x, dim) for dim in range(x.dim())]
    if all(len(one) <= 1 for one in runs):  # one block, or none
        return x
    blocks, offsets = [], []
    for block in product(*runs):
        local: Tensor = x.to_local()
        for dim, (_, begin, size) in enumerate(block):
            local = local.narrow(dim, begin, size)
        blocks.append(local)
        offsets.append(tuple(offset for offset, _, _ in block))
    held = LocalShardsWrapper(blocks, offsets)
    return DTensor.from_local(
        held, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def _runs(x: DTensor, dim: int) -> list[tuple[int, int, int]]:
    """The runs that this rank holds along a dimension: place in the whole, place here, size."""
    index = torch.arange(x.shape[dim]).view([1] * dim + [-1])
    for number, placement in enumerate(x.placements):
        if isinstance(placement, (Shard, _StridedShard)) and placement.dim == dim:
            ranks, rank = x.device_mesh.size(number), x.device_mesh.get_local_rank(number)
            index = placement._split_tensor(index, ranks, with_padding=False)[0][rank]
    index = index.flatten()
    breaks = (index.diff() != 1).nonzero().flatten() + 1
    borders = pairwise([0, *breaks.tolist(), len(index)])
    return [(int(index[begin]), begin, end - begin) for begin, end in borders if begin < end]
