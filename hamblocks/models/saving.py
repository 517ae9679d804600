"""Saving and loading: the configuration says what the model does."""

from __future__ import annotations

from typing import Any

from hamblocks.models.framework import FrameworkModel
from hamblocks.models.weights import complete_offloaded
from hamblocks_ops.arguments import wrong


class FollowsModel(FrameworkModel):
    """A model whose saved configuration states the target fractions and thresholds of its layers.

    These numbers stand in the policy of the selector and in the weights, and can be changed in a
    model, for example by `set_keep_fraction`.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: the configuration, or `selector`, states another target fraction or fixed
                threshold than the checkpoint holds.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        complete_offloaded(model, model._tied_heads())
        for layer, held in model.config.changed_selectors(model._selectors()).items():
            expected = f"that of the checkpoint in layer {layer}, {held} (change it in the model)"
            raise wrong("selector", expected, f"{model.config.policy('selector', layer)}")
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the configuration first takes over what was changed in the model."""
        self.config.follow(self._selectors())
        super().save_pretrained(*args, **kwargs)

    def _selectors(self) -> list[Any]:
        """The selector of every layer."""
        stack: Any = self.base_model.stack
        return [layer.selector for layer in stack.layers]
