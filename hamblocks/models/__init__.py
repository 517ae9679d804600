"""Models: nothing but blocks in a row. Those for transformers are loaded when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hamblocks.models.decoder import Decoder, DecoderOutput
from hamblocks.models.stack import Stack, StackOutput

if TYPE_CHECKING:
    from hamblocks.models.cache import HAMCache
    from hamblocks.models.configuration import HAMConfig
    from hamblocks.models.modeling import HAMForCausalLM, HAMModel
    from hamblocks.models.training import ControllerCallback

_LAZY = {
    "ControllerCallback": "training",
    "HAMCache": "cache",
    "HAMConfig": "configuration",
    "HAMForCausalLM": "modeling",
    "HAMModel": "modeling",
}

__all__ = [
    "ControllerCallback",
    "Decoder",
    "DecoderOutput",
    "HAMCache",
    "HAMConfig",
    "HAMForCausalLM",
    "HAMModel",
    "Stack",
    "StackOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # whatever is asked for first, the Auto classes know the models from then on
    importlib.import_module("hamblocks.models.modeling")
    return getattr(importlib.import_module(f"hamblocks.models.{_LAZY[name]}"), name)
