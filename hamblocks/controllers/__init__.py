"""Controllers: they set and move the threshold that a score must reach to be stored.

Buffers of a controller hold what is saved with a model: the threshold, the target and a sample of
the scores. All are float32, and model averaging (EMA), DDP and FSDP may average, broadcast or copy
them. Counts between two optimizer steps are plain attributes: they are neither saved nor averaged,
and no wrapper of a model overwrites them.
"""

from hamblocks.controllers.adapters import save_with_adapter
from hamblocks.controllers.annealed_fraction import AnnealedFraction
from hamblocks.controllers.elastic_fraction import ElasticFraction
from hamblocks.controllers.fixed_threshold import FixedThreshold, controller_of
from hamblocks.controllers.quantiles import threshold_between
from hamblocks.controllers.sampled import (
    REMIND_AFTER,
    SAMPLE_SIZE,
    SAMPLE_STEPS,
    SampledThreshold,
)
from hamblocks.controllers.stepping import hook_controllers, step_controllers
from hamblocks.controllers.target_fraction import TargetFraction
from hamblocks.controllers.tau import shortest

__all__ = [
    "REMIND_AFTER",
    "SAMPLE_SIZE",
    "SAMPLE_STEPS",
    "AnnealedFraction",
    "ElasticFraction",
    "FixedThreshold",
    "SampledThreshold",
    "TargetFraction",
    "controller_of",
    "hook_controllers",
    "save_with_adapter",
    "shortest",
    "step_controllers",
    "threshold_between",
]
