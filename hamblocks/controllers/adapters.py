"""Thresholds that move while an adapter trains are saved with the adapter (peft)."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

from torch import nn

from hamblocks.reachable import is_controller
from hamblocks_ops.arguments import wrong

COPIES = "modules_to_save"
"""The child of peft's wrapper that holds a copy of a module for each adapter."""

ORIGINAL = "original_module"
"""The child of peft's wrapper that is the module itself."""


def save_with_adapter(model: nn.Module) -> None:
    """Makes adapters of peft save the controllers that train with them.

    An adapter saves its own weights and the modules that its `modules_to_save` names. This adds the
    controllers to that list, so that `save_pretrained` of the adapter writes their buffers and
    loading the adapter reads them. peft then trains a copy of each controller, and the one of the
    base model stays as it is. Controllers that the list names already are left alone, and so is a
    model without adapters.

    Args:
        model: any module; a `peft.PeftModel`, a model of transformers with an adapter from
            `add_adapter`, or a module that holds one of these.

    Raises:
        ValueError: several layers share a controller, of which peft would copy one, or the adapter
            is of a kind that saves no modules (prompt tuning).
    """
    if "peft" not in sys.modules:  # without peft there is no adapter
        return
    held = [module for module in model.modules() if _has_adapters(module)]
    inside = {id(inner) for module in held for inner in list(module.modules())[1:]}
    for module in held:
        if id(module) not in inside:  # a PeftModel holds a tuner, which has adapters too
            _save_with(module)


def _has_adapters(module: Any) -> bool:
    """Whether a module is a `PeftModel`, or a model that transformers gave an adapter."""
    import peft

    return isinstance(module, peft.PeftModel) or bool(
        getattr(module, "_hf_peft_config_loaded", False)
    )


def _save_with(adapted: Any) -> None:
    import peft
    from peft.utils import set_additional_trainable_modules

    is_wrapped = isinstance(adapted, peft.PeftModel)
    base: nn.Module = adapted.get_base_model() if is_wrapped else adapted
    adapter = adapted.active_adapter if is_wrapped else adapted.active_adapters()[0]
    names = _unsaved(base, adapter)
    shared = [places for places in names.values() if len(places) > 1]
    if shared:
        expected = "a controller of its own for every layer under adapters, whose copies peft saves"
        raise wrong("model", expected, f"one controller as {', '.join(shared[0])}")
    if not names:
        return
    config = adapted.peft_config[adapter]
    if "modules_to_save" not in {field.name for field in dataclasses.fields(config)}:
        expected = "an adapter that saves modules beside its weights, as LoRA does"
        raise wrong("model", expected, f"one of {type(config).__name__}, without modules_to_save")
    new = list(dict.fromkeys(name for (name,) in names.values()))
    # only the new ones: peft would copy anew, and so reset, what it saves already
    alone = copy.copy(config)
    alone.modules_to_save = new
    for other in ("modules_to_tie", "trainable_token_indices"):
        if hasattr(alone, other):
            setattr(alone, other, None)
    set_additional_trainable_modules(
        model=base, peft_config=alone, model_config={}, adapter_name=adapter
    )
    for name in new:  # where another adapter saves the module too, peft leaves that one active
        wrapper: Any = base.get_submodule(name)
        wrapper.set_adapter(adapter)
    config.modules_to_save = [*(config.modules_to_save or ()), *new]


def _unsaved(base: nn.Module, adapter: str) -> dict[int, list[str]]:
    """Names of the controllers that an adapter has no copy of, by id.

    Where another adapter has a copy, peft has put a wrapper in the controller's place, which holds
    the controller as `original_module`. The name is then that of the wrapper.
    """
    names: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        has_buffers = bool(list(module.buffers()))
        if COPIES in name.split(".") or not has_buffers or not is_controller(module):
            continue
        place = f"{name}.".partition(f".{ORIGINAL}.")[0].removesuffix(".")
        if place != name:
            wrapper: Any = base.get_submodule(place)
            if adapter in wrapper.modules_to_save:
                continue
        names.setdefault(id(module), []).append(place)
    return names


def without_adapter(part: Any) -> Any:
    """The part of the base model, where peft has put a wrapper with copies of it in its place."""
    children = part._modules if isinstance(part, nn.Module) else {}
    return children[ORIGINAL] if {ORIGINAL, COPIES} <= children.keys() else part
