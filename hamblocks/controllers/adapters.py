"""Thresholds that move while an adapter trains are saved with the adapter (peft)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hamblocks.reachable import is_controller
from hamblocks_ops.arguments import wrong

BASE = "base_model.model."
"""What peft puts in front of the names of the base model's modules."""


def save_with_adapter(model: nn.Module) -> None:
    """Makes the adapters of a `peft.PeftModel` save the controllers that train with them.

    An adapter saves its own weights and the modules that its `modules_to_save` names. This adds the
    controllers to that list, so that `save_pretrained` of the adapter writes their buffers and
    `PeftModel.from_pretrained` reads them. peft then trains a copy of each controller, and the one
    of the base model stays as it is. Controllers that the list names already are left alone, and so
    is a model without adapters.

    Args:
        model: any module; a `peft.PeftModel`, or one that holds it.

    Raises:
        ValueError: several layers share a controller, of which peft would copy one.
    """
    for module in list(model.modules()):
        if callable(getattr(type(module), "set_additional_trainable_modules", None)):
            _save_with(module)


def _save_with(adapted: Any) -> None:
    names: dict[int, list[str]] = {}
    for name, module in adapted.named_modules(remove_duplicate=False):
        is_covered = ".modules_to_save." in name or ".original_module" in name
        has_buffers = bool(list(module.buffers()))
        if has_buffers and not is_covered and is_controller(module):
            names.setdefault(id(module), []).append(name.removeprefix(BASE))
    shared = [places for places in names.values() if len(places) > 1]
    if shared:
        expected = "a controller of its own for every layer under adapters, whose copies peft saves"
        raise wrong("model", expected, f"one controller as {', '.join(shared[0])}")
    if not names:
        return
    adapter = adapted.active_adapter
    config = adapted.peft_config[adapter]
    new = [name for (name,) in names.values()]
    # only the new ones: peft would copy anew, and so reset, what it saves already
    alone = copy.copy(config)
    alone.modules_to_save = new
    adapted.set_additional_trainable_modules(alone, adapter)
    config.modules_to_save = [*(config.modules_to_save or ()), *new]
