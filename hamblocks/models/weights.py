"""Which weights of a model transformers saves, loads and initialises."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hamblocks.layer import HAMLayer


def keep_weights(layers: list[HAMLayer]) -> None:
    """Marks a user's layers as initialised, so that transformers does not reset their weights.

    Modules on the meta device are left out: their weights are loaded or initialised later.
    """
    for layer in layers:
        for module in layer.modules():
            if not any(weight.is_meta for weight in (*module.parameters(), *module.buffers())):
                module._is_hf_initialized = True  # type: ignore[assignment]


def repeated(model: nn.Module) -> set[str]:
    """Keys of the state dict that repeat a module under another name.

    The keys under the module's first name are not included.
    """
    first: dict[int, str] = {}
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    again = [
        (name, module) for name, module in places if first.setdefault(id(module), name) != name
    ]
    return {f"{name}.{key}" for name, module in again for key in module.state_dict()}


def is_loaded(weight: Tensor) -> bool:
    """Whether transformers loaded the weight from a checkpoint."""
    return bool(getattr(weight, "_is_hf_initialized", False))


def lacks(model: nn.Module, weight: Tensor) -> bool:
    """Whether `model` was loaded from a checkpoint that does not contain `weight`.

    The weight is then uninitialised memory and needs a value.
    """
    return not is_loaded(weight) and any(is_loaded(other) for other in model.parameters())


def complete_offloaded(model: nn.Module, tied: dict[str, str]) -> None:
    """Gives accelerate the weights of gates' heads, which are tied, where their layers are on disk.

    accelerate fetches the weight of a module on disk when the module runs. A tied weight is not in
    the checkpoint, so it is found only if its source is on disk as well.

    Args:
        model: a model that was loaded with a device map, or any other.
        tied: names of the heads' weights, and of the weight that each is tied to.
    """
    for name, source in tied.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        origin: Any = model.get_submodule(source.rpartition(".")[0])
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None or "weight" in weights:
            continue
        weight = origin.weight
        if weight.is_meta:  # in memory, while the origin runs on another device
            weight = origin._hf_hook.weights_map["weight"]
        module._hf_hook.weights_map = {"weight": weight.detach()}
