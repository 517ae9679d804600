"""Selectors: from scores to lifetimes, for whole sequences or piece by piece.

`a | b` keeps what either selector keeps, `a & b` what both keep. Shapes: B batch rows, T new
tokens, N sequences, L ledger slots, H heads that decide.
"""

from hamblocks.ledger import lower
from hamblocks.selectors.budget import Budget
from hamblocks.selectors.causality import not_causal
from hamblocks.selectors.combined import AllOf, AnyOf, Combined, Composable
from hamblocks.selectors.cooldown import Cooldown
from hamblocks.selectors.error_mass import ErrorMass
from hamblocks.selectors.first_tokens import FirstTokens
from hamblocks.selectors.head_thresholds import HeadThresholds
from hamblocks.selectors.prompt_fraction import PromptFraction
from hamblocks.selectors.questions import ignores_score, is_causal, revises, start
from hamblocks.selectors.sublinear_growth import SublinearGrowth
from hamblocks.selectors.threshold import Threshold
from hamblocks.selectors.topk import TopK
from hamblocks.selectors.window import Window
from hamblocks.selectors.wrapper import Wrapper

__all__ = [
    "AllOf",
    "AnyOf",
    "Budget",
    "Combined",
    "Composable",
    "Cooldown",
    "ErrorMass",
    "FirstTokens",
    "HeadThresholds",
    "PromptFraction",
    "SublinearGrowth",
    "Threshold",
    "TopK",
    "Window",
    "Wrapper",
    "ignores_score",
    "is_causal",
    "lower",
    "not_causal",
    "revises",
    "start",
]
