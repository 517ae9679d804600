"""A model on a device mesh: tensor parallel, activation checkpointing and FSDP2, in that order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from hamblocks.block import SwiGLU
from hamblocks.layer import HAMLayer
from hamblocks.parallel.heads import check_splits
from hamblocks_ops.arguments import wrong

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    tensor: str | None = None,
    replicate: str | None = None,
    recompute: bool = False,
    param_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Prepares a model for training on the ranks of a mesh, in place.

    The ranks of the dimension `tensor` share the heads of every layer (see `split_heads`), and see
    the same tokens.

    The ranks of the dimension `replicate` hold copies of the same shards (HSDP).

    Parameters are sharded over all other dimensions of the mesh (FSDP2), block by block. One of
    them may be for context parallel: its ranks hold slices of the same sequences, and their
    gradients add up like those of different sequences.

    FSDP2 averages gradients over the ranks of all dimensions but `tensor`. For the gradient of the
    mean loss per token, let the loss of a rank be

        sum of the losses of its tokens * number of these ranks / number of tokens on all of them

    Args:
        model: a model whose blocks hold a `HAMLayer` as attribute `layer`, such as `Decoder`.
        mesh: dimensions for data, context and heads, e.g. `init_device_mesh("cuda", (4, 2),
            mesh_dim_names=("data", "tensor"))`.
        tensor: name of the mesh dimension whose ranks share heads. None: no rank shares heads.
        replicate: name of the mesh dimension whose ranks hold the same shards; the mesh then has
            exactly one dimension to shard over. None: parameters are sharded over all ranks.
        recompute: activation checkpointing: every block runs again in the backward pass.
        param_dtype: dtype of parameters in a block's call (mixed precision); gradients are reduced
            in float32, and those of float64 in float64. Weights that a part names in
            `float32_weights` keep their dtype, such as those of the decay of a `GatedDeltaMemory`.
            None: that of the parameters.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such block, the mesh has no dimension `tensor` or `replicate`,
            it has other dimensions than `replicate` needs, the heads cannot be shared, or
            `param_dtype` is given and torch is older than 2.7.
    """
    blocks = _blocks(model)
    if not blocks:
        raise wrong(
            "model", "blocks that hold a HAMLayer as attribute `layer`", type(model).__name__
        )
    names = mesh.mesh_dim_names or ()
    for argument, name in (("tensor", tensor), ("replicate", replicate)):
        if name is not None and name not in names:
            raise wrong(argument, f"a dimension of the mesh, {', '.join(names) or 'unnamed'}", name)
    others = tuple(name for name in names if name != tensor)
    if replicate is not None and (len(others) != 2 or replicate not in others):
        expected = "beside it one dimension to shard over, and tensor if heads are shared"
        raise wrong("replicate", expected, ", ".join(names))
    if tensor is not None:
        split_heads(model, mesh[tensor])
    if recompute:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if replicate is not None:
        shards = tuple(name for name in others if name != replicate)
        _shard(model, blocks, mesh[replicate, shards[0]], param_dtype)
    elif tensor is None or others:
        mesh = mesh if tensor is None else mesh[others]
        flat = mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names or ()))
        _shard(model, blocks, flat, param_dtype)
    return model


def _blocks(model: nn.Module) -> list[Any]:
    """The modules that hold a `HAMLayer` as attribute `layer`, without those inside another one.

    The blocks of a `HAMForCausalLM` are a `HAMBlock` inside a `HAMDecoderLayer`: both have the
    attribute, and FSDP2 cannot shard a module after the one around it.
    """
    found: list[Any] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) not in inside and isinstance(getattr(module, "layer", None), HAMLayer):
            found.append(module)
            inside.update(id(one) for one in module.modules())
    return found


def _shard(
    model: nn.Module, blocks: list[Any], mesh: DeviceMesh, param_dtype: torch.dtype | None
) -> None:
    """Shards the parameters over a mesh of one dimension, or of two: replicate, shard."""
    # imported here: it takes a second, and other users of this package have no mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard

    def placement(weight: nn.Parameter) -> Shard | None:
        # FSDP2 cannot shard dimension 0 where a rank holds rows of several blocks (_StridedShard)
        several = isinstance(weight, DTensor) and "Strided" in type(weight.placements[0]).__name__
        return Shard(1) if several else None

    reduced = None if param_dtype is None else torch.promote_types(param_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduced)
    shard = partial(fully_shard, mesh=mesh, shard_placement_fn=placement)
    if param_dtype is not None:
        _shard_in_float32(model, shard)
    kept = set() if param_dtype is None else set(_float32_weights(model))
    given = {"ignored_params": kept} if kept else {}  # torch 2.6 does not know the argument
    for module in (*blocks, model):
        shard(module, mp_policy=policy, **given)


@final
class _Around(nn.Module):
    """Calls a function. FSDP2 gathers parameters of other modules for its call; it has none."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _shard_in_float32(model: nn.Module, shard: Callable[..., Any]) -> None:
    """Shards the weights of `float32_weights`, which are gathered in their own dtype.

    FSDP2 casts all parameters that it gathers for a call to one dtype, and the modules of these
    weights have others too. So one module around the forward pass of the model gathers them: one
    small exchange for all blocks.
    """
    weights = set(_float32_weights(model))
    if not weights:
        return
    if "ignored_params" not in inspect.signature(shard.func).parameters:  # type: ignore[attr-defined]
        raise wrong("param_dtype", "None with torch before 2.7", "a dtype")
    around = _Around(model.forward)
    owners = [module for module in model.modules() if weights & set(module.parameters(False))]
    for number, owner in enumerate(owners):
        around.add_module(str(number), owner)
    others = set(model.parameters()) - weights
    shard(around, ignored_params=others, reshard_after_forward=False)
    for number in range(len(owners)):  # FSDP2 has them now; as children they had a second name
        delattr(around, str(number))
    # a child, so that settings for all FSDP modules of the model reach this one
    model.add_module("_float32_weights", around)

    @wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(*args, **kwargs)

    vars(model)["forward"] = forward


def _float32_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that parts of a model name in `float32_weights`."""
    for module in model.modules():
        for name in getattr(module, "float32_weights", ()):
            yield module.get_parameter(name)


def split_heads(model: nn.Module, mesh: DeviceMesh, *, src_data_rank: int | None = 0) -> nn.Module:
    """Lets the ranks of a mesh share the heads of every layer (tensor parallel), in place.

    Rank r of R holds the r-th of R equal runs of query heads, key/value heads, heads of the memory
    and channels of the MLPs; embedding and output head are split over the vocabulary.
    Every rank is called with the same tokens, and returns the same logits. Its states, caches and
    stats are those of its own heads. Parameters are `DTensor`s, which
    `torch.distributed.checkpoint` saves by the planners of `hamblocks.parallel.planners`.

    This is `parallelize_module(model, mesh, tensor_plan(model))` of torch, after which tied weights
    are tied again.

    Args:
        model: a model with one or more `HAMLayer`, or such a layer.
        mesh: a mesh of one dimension.
        src_data_rank: the rank of the mesh whose parameters all ranks take. None: every rank has
            the same already, and nothing is sent.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has more dimensions, the number of ranks does not divide the heads of a
            layer, or a part cannot be split (see `hamblocks.heads`). The model is unchanged.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    if mesh.ndim != 1:
        raise wrong("mesh", "one dimension, e.g. mesh['tensor']", f"{mesh.ndim} dimensions")
    layers = [module for module in model.modules() if isinstance(module, HAMLayer)]
    if not layers:
        raise wrong("model", "a model with a HAMLayer", type(model).__name__)
    for layer in layers:
        if layer.head_split is not None:
            raise wrong("model", "a model whose heads are not shared yet", "one whose heads are")
        check_splits(layer, mesh.size())
    names = names_of_weights(model)
    parallelize_module(model, mesh, tensor_plan(model), src_data_rank=src_data_rank)
    tie_again(model, names)
    return model


def names_of_weights(model: nn.Module) -> list[list[str]]:
    """The names of every parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return list(names.values())


def tie_again(model: nn.Module, names: list[list[str]]) -> None:
    """Gives tied parameters one tensor again, after each of their names got a tensor of its own.

    Args:
        model: the model.
        names: `names_of_weights` of the model while its parameters were tied.
    """
    for first, *others in names:
        for name in others:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._parameters[key] = model.get_parameter(first)


def tensor_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The style of every module of a model, for `parallelize_module` of torch.

    Layers and MLPs are split by hamblocks' own style. Of the other modules, an `nn.Embedding` is
    split over its rows (`RowwiseParallel`), and an `nn.Linear` over its outputs, which are gathered
    (`GatheredColumns`). All others are held whole, and so is a weight that a gate inside a layer
    uses too (`PredictionEntropy`).

    Args:
        model: a model with one or more `HAMLayer`, or such a layer.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel

    from hamblocks.parallel.styles import GatheredColumns, HeadParallel, Whole

    plan: dict[str, ParallelStyle] = {}
    layers = [module for module in model.modules() if isinstance(module, HAMLayer)]
    inside = {id(weight) for layer in layers for weight in layer.parameters()}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, (HAMLayer, SwiGLU)):
            plan[name] = HeadParallel()
            return
        own = list(module.parameters(recurse=False))
        if own:
            is_shared = any(id(weight) in inside for weight in own)
            if type(module) is nn.Embedding and not is_shared:
                plan[name] = RowwiseParallel(input_layouts=Replicate())
            elif type(module) is nn.Linear and not is_shared:
                plan[name] = GatheredColumns()
            else:
                plan[name] = Whole()
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return plan
