"""Swappable building blocks for Hybrid Associative Memory layers (arXiv 2603.22325).

A recurrent delta-rule memory sees every token, a KV cache stores only the tokens that the memory
fails to predict, and softmax attention runs over the stored tokens. Importing needs torch alone.

Names are imported when they are first used, so that `import hamblocks` itself imports no torch. The
pytest plugin relies on this: pytest imports it in every suite of the environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; `_HOME` below says the same at run time
    from hamblocks import ops as ops
    from hamblocks.absent import NoAttention, NoMemory
    from hamblocks.attention import SelectedAttention
    from hamblocks.block import HAMBlock, SwiGLU
    from hamblocks.cache import KVCache, cache_transaction
    from hamblocks.combiners import GatedSum, SoftmaxMix
    from hamblocks.controllers import (
        FixedThreshold,
        TargetFraction,
        hook_controllers,
        step_controllers,
    )
    from hamblocks.gates import LearnedRouter, PeriodicGate, PredictionError, RandomGate, SharedGate
    from hamblocks.layer import HAMLayer, LayerOutput, LayerStats
    from hamblocks.memory import DeltaMemory, DeltaMemoryState, GatedDeltaMemory, ShortConvolution
    from hamblocks.models import Decoder, DecoderOutput
    from hamblocks.protocols import GateOutput, LayerDims, Lifetimes, MemoryTrace, Selection
    from hamblocks.selectors import AllOf, AnyOf, FirstTokens, Threshold, TopK, Window
    from hamblocks.state import HAMState

__version__ = "0.1.0"

_HOME = {
    "AllOf": "selectors",
    "AnyOf": "selectors",
    "Decoder": "models",
    "DecoderOutput": "models",
    "DeltaMemory": "memory",
    "DeltaMemoryState": "memory",
    "FirstTokens": "selectors",
    "FixedThreshold": "controllers",
    "GateOutput": "protocols",
    "GatedDeltaMemory": "memory",
    "GatedSum": "combiners",
    "HAMBlock": "block",
    "HAMLayer": "layer",
    "HAMState": "state",
    "KVCache": "cache",
    "LayerDims": "protocols",
    "LayerOutput": "layer",
    "LayerStats": "layer",
    "LearnedRouter": "gates",
    "Lifetimes": "protocols",
    "MemoryTrace": "protocols",
    "NoAttention": "absent",
    "NoMemory": "absent",
    "PeriodicGate": "gates",
    "PredictionError": "gates",
    "RandomGate": "gates",
    "SelectedAttention": "attention",
    "Selection": "protocols",
    "SharedGate": "gates",
    "ShortConvolution": "memory",
    "SoftmaxMix": "combiners",
    "SwiGLU": "block",
    "TargetFraction": "controllers",
    "Threshold": "selectors",
    "TopK": "selectors",
    "Window": "selectors",
    "cache_transaction": "cache",
    "hook_controllers": "controllers",
    "step_controllers": "controllers",
}
"""The module of every public name."""

_MODULES = frozenset({*_HOME.values(), "ops"})
"""Modules that are attributes of the package without an import of their own: `hamblocks.layer`."""

__all__ = [
    "AllOf",
    "AnyOf",
    "Decoder",
    "DecoderOutput",
    "DeltaMemory",
    "DeltaMemoryState",
    "FirstTokens",
    "FixedThreshold",
    "GateOutput",
    "GatedDeltaMemory",
    "GatedSum",
    "HAMBlock",
    "HAMLayer",
    "HAMState",
    "KVCache",
    "LayerDims",
    "LayerOutput",
    "LayerStats",
    "LearnedRouter",
    "Lifetimes",
    "MemoryTrace",
    "NoAttention",
    "NoMemory",
    "PeriodicGate",
    "PredictionError",
    "RandomGate",
    "SelectedAttention",
    "Selection",
    "SharedGate",
    "ShortConvolution",
    "SoftmaxMix",
    "SwiGLU",
    "TargetFraction",
    "Threshold",
    "TopK",
    "Window",
    "cache_transaction",
    "hook_controllers",
    "ops",
    "step_controllers",
]


if not TYPE_CHECKING:  # type checkers would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(f"hamblocks.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"hamblocks.{_HOME[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
