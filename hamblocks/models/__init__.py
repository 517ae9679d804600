"""Models: stacks of blocks. Those for transformers are imported when they are first used.

Where transformers is installed, importing this package registers the configuration with its Auto
classes, so that `AutoModelForCausalLM.from_pretrained` loads a saved model.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hamblocks.decoder import Decoder, DecoderOutput
from hamblocks.extras import require
from hamblocks.stack import Stack, StackOutput

if TYPE_CHECKING:
    from hamblocks.models.attached import AttachedCache, AttachedPolicy, attach_policy
    from hamblocks.models.cache import HAMCache
    from hamblocks.models.configuration import HAMConfig
    from hamblocks.models.conversion import Conversion, convert, convert_recorded
    from hamblocks.models.copying import copying_by_head
    from hamblocks.models.key_value_memory import KeyValueMemory
    from hamblocks.models.modeling import HAMForCausalLM, HAMModel
    from hamblocks.models.training import ControllerCallback

_HOME = {
    "AttachedCache": "attached",
    "AttachedPolicy": "attached",
    "ControllerCallback": "training",
    "Conversion": "conversion",
    "HAMCache": "cache",
    "HAMConfig": "configuration",
    "HAMForCausalLM": "modeling",
    "HAMModel": "modeling",
    "KeyValueMemory": "key_value_memory",
    "attach_policy": "attached",
    "convert": "conversion",
    "convert_recorded": "conversion",
    "copying_by_head": "copying",
}
"""The module of every name that needs transformers."""

__all__ = [
    "AttachedCache",
    "AttachedPolicy",
    "ControllerCallback",
    "Conversion",
    "Decoder",
    "DecoderOutput",
    "HAMCache",
    "HAMConfig",
    "HAMForCausalLM",
    "HAMModel",
    "KeyValueMemory",
    "Stack",
    "StackOutput",
    "attach_policy",
    "convert",
    "convert_recorded",
    "copying_by_head",
]


if not TYPE_CHECKING:  # type checkers would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        require("hf", f"hamblocks.models.{name}", "transformers")
        try:
            # the Auto classes know the models from here, whichever name is used first
            import_module("hamblocks.models.modeling")
        except ImportError as error:
            raise ImportError(
                f"hamblocks.models.{name} needs transformers 5.6 or later, and below 6: "
                f"pip install 'hamblocks[hf]' ({error})"
            ) from error
        value: object = getattr(import_module(f"hamblocks.models.{_HOME[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if find_spec("transformers") is not None:
    # What fails here fails again, and aloud, when a model of transformers is used. Others, who use
    # hamblocks without transformers, must not suffer from one that cannot be imported.
    with contextlib.suppress(Exception):
        import_module("hamblocks.models.configuration")
