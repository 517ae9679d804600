"""Gates: they score how much a token deserves to be stored."""

from hamblocks.gates.committed_write import CommittedWrite
from hamblocks.gates.given_score import GivenScore
from hamblocks.gates.key_norm import KeyNorm
from hamblocks.gates.learned_router import LearnedRouter
from hamblocks.gates.periodic_gate import PeriodicGate
from hamblocks.gates.prediction_entropy import PredictionEntropy
from hamblocks.gates.prediction_error import PredictionError
from hamblocks.gates.random_gate import RandomGate
from hamblocks.gates.recall_error import RecallError
from hamblocks.gates.shared_gate import SharedGate
from hamblocks.gates.value_norm import ValueNorm
from hamblocks.gates.weighted_sum import WeightedSum

__all__ = [
    "CommittedWrite",
    "GivenScore",
    "KeyNorm",
    "LearnedRouter",
    "PeriodicGate",
    "PredictionEntropy",
    "PredictionError",
    "RandomGate",
    "RecallError",
    "SharedGate",
    "ValueNorm",
    "WeightedSum",
]
