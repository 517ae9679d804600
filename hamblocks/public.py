"""The public names of hamblocks, which the package itself imports when one of them is used."""

from hamblocks import ops
from hamblocks.attention import SelectedAttention
from hamblocks.block import HAMBlock, SwiGLU
from hamblocks.cache import KVCache, cache_transaction
from hamblocks.combiners import GatedSum, ScaledSum, SoftmaxMix
from hamblocks.controllers import (
    AnnealedFraction,
    ElasticFraction,
    FixedThreshold,
    TargetFraction,
    hook_controllers,
    step_controllers,
)
from hamblocks.convolution import ShortConvolution
from hamblocks.decoder import Decoder, DecoderOutput
from hamblocks.gates import (
    CommittedWrite,
    GivenScore,
    KeyNorm,
    LearnedRouter,
    PeriodicGate,
    PredictionEntropy,
    PredictionError,
    RandomGate,
    RecallError,
    SharedGate,
    ValueNorm,
    WeightedSum,
)
from hamblocks.keys import DenseKeys, Keys
from hamblocks.layer import HAMLayer
from hamblocks.memory import DeltaMemory, DeltaMemoryState, GatedDeltaMemory
from hamblocks.outputs import LayerExplanation, LayerOutput, LayerStats
from hamblocks.packed import per_sequence
from hamblocks.protocols import (
    GateOutput,
    LayerDims,
    Lifetimes,
    MemoryTrace,
    QueryGateOutput,
    Selection,
)
from hamblocks.query_gates import ThresholdQueries
from hamblocks.selectors import (
    AllOf,
    AnyOf,
    Budget,
    Cooldown,
    ErrorMass,
    FirstTokens,
    HeadThresholds,
    PromptFraction,
    SublinearGrowth,
    Threshold,
    TopK,
    Window,
)
from hamblocks.state import HAMState
from hamblocks.unstored_memory import UnstoredMemory
from hamblocks_ops import explain

__all__ = [
    "AllOf",
    "AnnealedFraction",
    "AnyOf",
    "Budget",
    "CommittedWrite",
    "Cooldown",
    "Decoder",
    "DecoderOutput",
    "DeltaMemory",
    "DeltaMemoryState",
    "DenseKeys",
    "ElasticFraction",
    "ErrorMass",
    "FirstTokens",
    "FixedThreshold",
    "GateOutput",
    "GatedDeltaMemory",
    "GatedSum",
    "GivenScore",
    "HAMBlock",
    "HAMLayer",
    "HAMState",
    "HeadThresholds",
    "KVCache",
    "KeyNorm",
    "Keys",
    "LayerDims",
    "LayerExplanation",
    "LayerOutput",
    "LayerStats",
    "LearnedRouter",
    "Lifetimes",
    "MemoryTrace",
    "PeriodicGate",
    "PredictionEntropy",
    "PredictionError",
    "PromptFraction",
    "QueryGateOutput",
    "RandomGate",
    "RecallError",
    "ScaledSum",
    "SelectedAttention",
    "Selection",
    "SharedGate",
    "ShortConvolution",
    "SoftmaxMix",
    "SublinearGrowth",
    "SwiGLU",
    "TargetFraction",
    "Threshold",
    "ThresholdQueries",
    "TopK",
    "UnstoredMemory",
    "ValueNorm",
    "WeightedSum",
    "Window",
    "cache_transaction",
    "explain",
    "hook_controllers",
    "ops",
    "per_sequence",
    "step_controllers",
]
