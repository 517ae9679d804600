"""A model on the ranks of a device mesh: recomputation and FSDP2, in the right order."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from hamblocks.layer import HAMLayer
from hamblocks_ops.arguments import wrong


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    recompute: bool = False,
    param_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Prepares a model for training on the ranks of a mesh, in place.

    Parameters are sharded over all dimensions of the mesh (FSDP2), block by block. A dimension for
    context parallel is among them: its ranks hold slices of one batch, so their gradients are added
    like those of a batch. FSDP2 averages gradients over ranks: let every rank's loss be its sum over
    its tokens, times the number of ranks, over the number of tokens of all.

    Args:
        model: a model whose blocks hold a `HAMLayer` as attribute `layer`, such as `Decoder`.
        mesh: dimensions for data and context, e.g. `init_device_mesh("cuda", (4, 2),
            mesh_dim_names=("data", "context"))`.
        recompute: run every block again in the backward pass instead of keeping what it computed.
        param_dtype: dtype of parameters in a block's call (mixed precision); gradients are reduced
            in float32. None: that of the parameters.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such block.
    """
    # imported here: it takes a second, and other users of this package have no mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "layer", None), HAMLayer)
    ]
    if not blocks:
        raise wrong(
            "model", "blocks that hold a HAMLayer as attribute `layer`", type(model).__name__
        )
    flat = mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names or ()))
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32
    )
    for block in blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=flat, mp_policy=policy)
    fully_shard(model, mesh=flat, mp_policy=policy)
    return model
