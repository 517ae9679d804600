"""Whether x fits the weights of a layer, asked only where torch would not say so by itself.

What dtype and device x must have is not known before the call. Weights may be stored as integers,
in another dtype than they are used in, as tensor subclasses, or elsewhere: offloading
(`accelerate.cpu_offload`, `device_map`) keeps them on the meta device and loads them when the
module that owns them is called.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hamblocks_ops.arguments import wrong

FSDP = "torch.distributed.fsdp"


def check_present(layer: nn.Module, x: Tensor, weight: Tensor) -> None:
    """Checks x on one device and a weight on the meta device, or the other way round.

    Torch computes with them without an error: from a meta weight comes what was in memory.

    Raises:
        ValueError: x is on the meta device, or a weight is that nothing loads for the call.
    """
    if x.is_meta or _is_absent(layer):
        raise wrong("x", f"device {weight.device}, as the layer", x)


def _is_absent(layer: nn.Module) -> bool:
    """Whether the layer has a weight on the meta device that nothing will load for a call.

    A module can only be given its weights at its own call. So its weights are absent if it has no
    hook before its call, and its `forward` is that of its class.
    """
    if torch_module._global_forward_pre_hooks:
        return False
    return any(
        weight.is_meta
        for owner in layer.modules()
        if not owner._forward_pre_hooks and "forward" not in vars(owner)
        for weight in owner.parameters(recurse=False)
    )


def is_plain(*modules: nn.Module) -> bool:
    """Whether the weights of modules may be read outside of their own calls.

    Hooks, and a `forward` that another library has put in the place of that of the class, may
    gather, load or cast weights for the call.
    """
    return not torch_module._global_forward_pre_hooks and not any(
        module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
        for module in modules
    )


def check_within_reach(part: nn.Module) -> None:
    """Checks that a method of a part with hooks can use its parameters outside the part's own call.

    They are out of reach where the part itself was sharded, or offloaded with a hook of its own.

    Raises:
        ValueError: they are.
    """
    sharded = isinstance(part, getattr(sys.modules.get(FSDP), "FSDPModule", ()))
    if sharded or any(weight.is_meta for weight in part.parameters(recurse=False)):
        expected = "a part with prepares_when_called = True (see hamblocks.protocols)"
        got = f"{type(part).__name__}, whose weights come for its own call only"
        raise wrong("attention", expected, got)


def check_like_weights(layer: nn.Module, x: Tensor) -> None:
    """Checks x after torch refused to project it; returns if x does not explain the error.

    Raises:
        ValueError: all weights have one device or one dtype, and x has another.
    """
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    devices = {weight.device for weight in weights}
    dtypes = {weight.dtype for weight in weights}
    if len(devices) == 1 and x.device not in devices and not weights[0].is_meta:
        raise wrong("x", f"device {weights[0].device}, as the layer", x)
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if len(dtypes) == 1 and x.dtype not in dtypes and not casts:
        expected = f"dtype {str(weights[0].dtype).removeprefix('torch.')}, as the layer"
        raise wrong("x", expected, x)
