"""Tensor parallel: the ranks of a group share the heads of a layer and the channels of an MLP.

Parameters become `DTensor`s, so that optimizers, FSDP2 and checkpoints of PyTorch know which rank
holds what. A call computes with plain tensors, those of the rank's own heads, and sums over the
ranks twice: y in the forward pass, and the gradients of x and of the parameters that every rank
holds whole in the backward pass (Megatron-LM, arXiv 1909.08053). Selectors exchange nothing, since
every key/value head decides for itself; parts that need all heads gather them (`hamblocks.heads`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hamblocks.calls import CallsParts
from hamblocks.heads import (
    DecidesByHead,
    HasScoreHeads,
    HeadShare,
    How,
    NotTrained,
    OnFirstRank,
    SharedCall,
    Split,
    SplitsHeads,
    in_shared_call,
    scores_once,
)
from hamblocks.outputs import LayerOutput
from hamblocks.protocols import LayerDims
from hamblocks.reachable import find_controllers
from hamblocks_ops.arguments import wrong

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class HeadSplit(NamedTuple):
    """How a module is split.

    Attributes:
        share: the heads of this rank.
        splits: how its parameters and buffers are cut, by name; those without a name are whole.
        call: calls the module on what the rank holds: `call_split` or `of_rank`, outside of what
            `torch.compile` compiles.
    """

    share: HeadShare
    splits: Mapping[str, How]
    call: Callable[..., Any]


# calls


@final
class _Enter(Function):
    """Tensors that all ranks have, for a call on some heads: gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, share: HeadShare, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.share = share
        return tuple(x.view_as(x) for x in whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # One exchange for each dtype. Which gradients there are is the same on all ranks; those
        # that nothing on this rank depends on are 0.
        by_dtype: dict[torch.dtype, list[int]] = {}
        for place, gradient in enumerate(gradients):
            if ctx.needs_input_grad[place + 1]:
                by_dtype.setdefault(gradient.dtype, []).append(place)
        summed: list[Tensor | None] = [None] * len(gradients)
        for places in by_dtype.values():
            some = [gradients[place] for place in places]
            flat = torch.cat([x.reshape(-1) for x in some])
            dist.all_reduce(flat, group=ctx.share.group)
            parts = flat.split([x.numel() for x in some])
            for place, part, like in zip(places, parts, some, strict=True):
                summed[place] = part.view(like.shape)
        return None, *summed


@final
class _Sum(Function):
    """The sum over ranks of what each of them computed; every rank has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: HeadShare) -> Tensor:
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=share.group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None


@contextlib.contextmanager
def _entered(module: nn.Module, split: HeadSplit, x: Tensor) -> Iterator[Tensor]:
    """Context in which a module has the parameters and buffers of this rank's heads.

    Yields:
        x, whose gradient is summed over the ranks.
    """
    share, splits, _ = split
    ranks = share.rank, share.ranks
    weights = module.named_parameters(remove_duplicate=False)
    held = {name: _local(name, weight, splits) for name, weight in weights}
    local = {name: weight for name, (weight, _) in held.items()}
    for name, how in splits.items():
        if isinstance(how, NotTrained):
            local[name] = local[name].detach()
    whole = [
        name
        for name, (_, is_whole) in held.items()
        if is_whole and not isinstance(splits.get(name), NotTrained)
    ]
    x, *summed = _Enter.apply(share, x, *(held[name][0] for name in whole))  # type: ignore[no-untyped-call]
    for name, weight in zip(whole, summed, strict=True):
        by = splits.get(name)
        if isinstance(by, OnFirstRank) and share.rank > 0:
            weight = weight * 0
        elif isinstance(by, Split):
            weight = by.of_rank(weight, *ranks)
        local[name] = weight
    for name, buffer in module.named_buffers():
        by = splits.get(name)
        if isinstance(by, Split):
            local[name] = by.of_rank(buffer, *ranks)
    restore: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in local.items():
            owner, _, key = name.rpartition(".")
            held_by = module.get_submodule(owner)
            tensors: dict[str, Any] = (
                held_by._parameters if key in held_by._parameters else held_by._buffers
            )
            restore.append((tensors, key, tensors[key]))
            tensors[key] = tensor
        yield x
    finally:
        for tensors, key, tensor in restore:
            tensors[key] = tensor


def _local(name: str, weight: Tensor, splits: Mapping[str, How]) -> tuple[Tensor, bool]:
    """What this rank holds of a parameter, and whether that is the whole parameter."""
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return weight, True
    # _StridedShard says that it is no shard
    is_cut = any(not placement.is_replicate() for placement in weight.placements)
    if is_cut and not isinstance(splits.get(name), Split):
        raise wrong(name, "a parameter that every rank holds whole", f"{weight.placements}")
    return weight.to_local(), not is_cut


def of_rank(
    module: nn.Module, split: HeadSplit, call: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """The sum over ranks of `call(x)`, in which a module has the parameters of its own channels."""
    with _entered(module, split, x) as own:
        y = call(own)
    summed: Tensor = _Sum.apply(y, split.share)  # type: ignore[no-untyped-call]
    return summed


def call_split(
    layer: CallsParts, split: HeadSplit, x: Tensor, given_score: Tensor | None, **given: Any
) -> LayerOutput:
    """`HAMLayer.forward` on the heads of one rank; every rank of the group must call it.

    Args:
        layer: the layer.
        split: how it is split.
        x: `[B, T, hidden_size]`, the same on all ranks.
        given_score: as in `HAMLayer.forward`, of one head or all heads of the layer.
        given: further arguments of `HAMLayer.forward`.

    Returns:
        y of all heads; state and stats of those of this rank.
    """
    share, heads = split.share, None
    if given_score is not None and given_score.dim() == 3:
        heads = given_score.shape[2]
        local = layer.dims.num_kv_heads, layer.dims.num_heads
        allowed = [1, *(count * share.ranks for count in local)]
        if heads not in allowed:
            raise wrong("given_score", f"{', '.join(map(str, allowed))} heads", f"{heads}")
        if heads > 1:
            given_score = given_score[..., share.own(heads)]
    call = SharedCall(share, scores_once(layer.gate, heads))
    with in_shared_call(call), _entered(layer, split, x) as own:
        output: LayerOutput = layer.forward(own, given_score=given_score, **given)
    y: Tensor = _Sum.apply(output.y, share)  # type: ignore[no-untyped-call]
    return output._replace(y=y)


# splitting


def local_dims(dims: LayerDims, ranks: int) -> LayerDims:
    """The sizes of a layer with the heads of one of some ranks."""
    memory = dims.memory_heads
    return dims._replace(
        num_heads=dims.num_heads // ranks,
        num_kv_heads=dims.num_kv_heads // ranks,
        memory_heads=None if memory is None else memory // ranks,
    )


def check_splits(layer: CallsParts, ranks: int) -> None:
    """Checks that a layer can be split.

    Raises:
        ValueError: the ranks do not divide its heads, or a part cannot be split.
    """
    dims = layer.dims
    counts = {"num_heads": dims.num_heads, "num_kv_heads": dims.num_kv_heads}
    if dims.has_memory:
        counts["num_heads of the memory"] = dims.memory_read[0]
        key_heads: int | None = getattr(layer.memory, "num_k_heads", None)
        if key_heads is not None:
            counts["num_k_heads of the memory"] = key_heads
    for name, count in counts.items():
        if count % ranks:
            raise wrong(name, f"a multiple of the {ranks} ranks that share the heads", str(count))
    why = "so that ranks can share its heads"
    for name in ("memory", "attention", "combiner"):
        part = getattr(layer, name)
        if part is not None and not isinstance(part, SplitsHeads):
            raise wrong(name, f"one with split_heads (hamblocks.heads.SplitsHeads), {why}", part)
    for name in ("gate", "query_gate"):
        for gate in _gates(getattr(layer, name)):
            if not isinstance(gate, HasScoreHeads):
                expected = f"one with score_heads (hamblocks.heads.HasScoreHeads), {why}"
                raise wrong(name, expected, gate)
    selector = layer.selector
    if selector is not None and not (isinstance(selector, DecidesByHead) and selector.by_head):
        expected = f"one with by_head = True (hamblocks.heads.DecidesByHead), {why}"
        raise wrong("selector", expected, selector)
    for part in (selector, layer.query_gate):
        for controller in find_controllers(part):
            if not getattr(controller, "by_head", False):
                expected = f"one with by_head = True, which counts the heads of all ranks, {why}"
                raise wrong("controller", expected, controller)


def _gates(gate: object) -> list[object]:
    """A gate and the gates inside it; empty for None."""
    if gate is None:
        return []
    inner = getattr(gate, "gates", None) or [getattr(gate, "gate", None)]
    return [gate, *(one for each in inner for one in _gates(each))]


def split_module(module: nn.Module, mesh: DeviceMesh, source: int | None = 0) -> None:
    """Makes the parameters of a module `DTensor`s on a mesh, and gives each rank its own heads.

    Args:
        module: a `HAMLayer` or `SwiGLU`, whose parameters are whole.
        mesh: a mesh of one dimension.
        source: the rank of the mesh whose parameters all ranks take; None: each rank has the same.

    Raises:
        ValueError: a part cannot be split.
    """
    share = HeadShare(mesh.get_group())
    if isinstance(module, CallsParts):
        check_splits(module, share.ranks)
    splits: dict[str, How] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, SplitsHeads):
            for name, how in part.split_heads(share.ranks).items():
                splits[f"{prefix}.{name}" if prefix else name] = how
    made: dict[int, nn.Parameter] = {}
    for name, weight in list(module.named_parameters(remove_duplicate=False)):
        owner, _, key = name.rpartition(".")
        if id(weight) not in made:
            made[id(weight)] = _distributed(weight, splits.get(name), mesh, source)
        module.get_submodule(owner)._parameters[key] = made[id(weight)]
    call = torch.compiler.disable(call_split if isinstance(module, CallsParts) else of_rank)
    vars(module)["head_split"] = HeadSplit(share, splits, call)


def hold_whole(module: nn.Module, mesh: DeviceMesh, source: int | None = 0) -> None:
    """Makes a module's own parameters `DTensor`s that every rank holds whole.

    Optimizers and the clipping of gradients take no mixture of tensors and DTensors.
    """
    weights = list(module.named_parameters(recurse=False))
    for name, weight in weights:
        module._parameters[name] = _distributed(weight, None, mesh, source)
    if weights:
        module.register_forward_pre_hook(_use_local)
        module.register_forward_hook(_use_distributed, always_call=True)


def _use_local(module: nn.Module, _: Any) -> None:
    distributed = dict(module._parameters)
    module._parameters.update(
        {name: _local(name, x, {})[0] for name, x in distributed.items() if x is not None}  # type: ignore[misc]
    )
    vars(module)["_distributed"] = distributed


def _use_distributed(module: nn.Module, *_: Any) -> None:
    distributed: Any = vars(module).pop("_distributed", None)
    if distributed is not None:
        module._parameters.update(distributed)


def _distributed(
    weight: nn.Parameter, how: How | None, mesh: DeviceMesh, source: int | None
) -> nn.Parameter:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    placement: Any = Replicate()
    if isinstance(how, Split) and not how.is_small:
        blocks = len(how.blocks)
        if blocks == 1:
            placement = Shard(how.dim)
        elif len(set(how.blocks)) == 1 and how.blocks[0] % mesh.size() == 0:
            placement = _StridedShard(how.dim, split_factor=blocks)
    source = None if weight.is_meta else source
    distributed = distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=source)
    return nn.Parameter(distributed, weight.requires_grad)
