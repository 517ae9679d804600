"""Training with transformers' Trainer."""

from __future__ import annotations

from typing import Any, final

from torch import nn
from transformers import TrainerCallback

from hamblocks.controllers import step_controllers


@final
class ControllerCallback(TrainerCallback):
    """Moves the thresholds of a model behind every optimizer step: `Trainer(..., callbacks=[ControllerCallback()])`."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, once per update, however many batches its gradient came from."""
        model: nn.Module = kwargs["model"]
        step_controllers(model)
