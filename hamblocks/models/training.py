"""Training with transformers' Trainer."""

from __future__ import annotations

from typing import Any, final

from torch import nn
from transformers import TrainerCallback

from hamblocks.controllers import save_with_adapter, step_controllers


@final
class ControllerCallback(TrainerCallback):
    """Moves the thresholds of a model after every optimizer step.

    Pass it to the Trainer: `Trainer(..., callbacks=[ControllerCallback()])`. An adapter of peft
    saves the thresholds too.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer calls this when it is made, before it loads a checkpoint to resume from."""
        save_with_adapter(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer calls this once, before the first step: it may have got the callback late."""
        save_with_adapter(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer calls this once per update, for any number of accumulated batches."""
        model: nn.Module = kwargs["model"]
        step_controllers(model)
