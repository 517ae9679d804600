"""Moves the thresholds of a model once per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hamblocks.controllers.adapters import save_with_adapter
from hamblocks.reachable import model_controllers
from hamblocks_ops.arguments import wrong

WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "optim")
"""Attributes by which wrappers hold the optimizer that they step."""


def step_controllers(model: nn.Module) -> None:
    """Moves the thresholds of all controllers in a model; call it after every optimizer step.

    A controller is found by its type, `hamblocks.protocols.Controller`, among the modules of the
    model and, in the parts of its layers, in plain objects, containers and closures too. A
    controller that several layers share is stepped once. Controllers inside a controller are left
    to it, and `model` itself is not stepped.

    Args:
        model: any module; a single layer or selector too.
    """
    for controller in model_controllers(model):
        controller.step()


def hook_controllers(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Registers a hook so that every `optimizer.step()` calls `step_controllers(model)`.

    The hook belongs to this object. A copy of the optimizer (`copy.deepcopy`, pickling) has none:
    register it anew. Where the optimizer is a wrapper that cannot hold hooks, such as accelerate's,
    the hook is registered with the optimizer inside, so a step that the wrapper leaves out moves no
    threshold either.

    Where the model is a `peft.PeftModel`, its adapter is told to save the controllers too (see
    `save_with_adapter`): else the thresholds that move while it trains would be lost.

    Args:
        optimizer: an optimizer, or a wrapper that holds one.
        model: as in `step_controllers`.

    Returns:
        The handle of the hook; `handle.remove()` removes it.

    Raises:
        ValueError: neither the optimizer nor one inside it can hold hooks, or layers of a model
            with adapters share a controller.
    """
    save_with_adapter(model)

    def after_step(*_: object) -> None:
        step_controllers(model)

    for candidate in _inside(optimizer):
        try:
            return candidate.register_step_post_hook(after_step)
        except AttributeError:  # no such method, or Optimizer.__init__ was never called
            continue
    raise wrong(
        "optimizer",
        "a torch.optim.Optimizer or a wrapper of one (else call "
        "hamblocks.step_controllers(model) after every step)",
        type(optimizer).__name__,
    )


def _inside(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps, from the outside in."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if candidate is None or any(candidate is one for one in found):
            continue
        found.append(candidate)
        held = [getattr(candidate, name, None) for name in WRAPPED]
        waiting += [one for one in held if callable(getattr(one, "step", None))]
    return found
