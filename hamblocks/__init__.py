"""Swappable building blocks for Hybrid Associative Memory layers (arXiv 2603.22325).

A recurrent delta-rule memory sees every token, a KV cache stores only the tokens that memory fails to predict, and
softmax attention runs over those. Importing needs torch alone.
"""

from hamblocks import ops
from hamblocks.absent import NoAttention, NoMemory
from hamblocks.attention import SelectedAttention
from hamblocks.block import HAMBlock, SwiGLU
from hamblocks.cache import KVCache, transaction
from hamblocks.combiners import GatedSum, SoftmaxMix
from hamblocks.controllers import FixedThreshold, TargetFraction, hook_controllers, step_controllers
from hamblocks.gates import LearnedRouter, Periodic, PredictionError, RandomRouting, Shared
from hamblocks.layer import HAMLayer, LayerOutput, LayerStats
from hamblocks.memory import Delta, GatedDelta, MemoryState, ShortConvolution
from hamblocks.models import Decoder, DecoderOutput
from hamblocks.protocols import Dims, GateOutput, Lifetimes, Selection, Trace
from hamblocks.selectors import AllOf, AnyOf, First, Threshold, TopK, Window
from hamblocks.state import HAMState

__version__ = "0.1.0"

__all__ = [
    "AllOf",
    "AnyOf",
    "Decoder",
    "DecoderOutput",
    "Delta",
    "Dims",
    "First",
    "FixedThreshold",
    "GateOutput",
    "GatedDelta",
    "GatedSum",
    "HAMBlock",
    "HAMLayer",
    "HAMState",
    "KVCache",
    "LayerOutput",
    "LayerStats",
    "LearnedRouter",
    "Lifetimes",
    "MemoryState",
    "NoAttention",
    "NoMemory",
    "Periodic",
    "PredictionError",
    "RandomRouting",
    "SelectedAttention",
    "Selection",
    "Shared",
    "ShortConvolution",
    "SoftmaxMix",
    "SwiGLU",
    "TargetFraction",
    "Threshold",
    "TopK",
    "Trace",
    "Window",
    "hook_controllers",
    "ops",
    "step_controllers",
    "transaction",
]
