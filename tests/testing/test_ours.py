"""Every op, part and layer of ours passes the checks that users run on theirs."""

from __future__ import annotations

import math
from typing import Any

import parts_cases
import pytest
from parts_cases import CASES, AtLeast, Loudness, Parity, Size, Smallest, Sum

import hamblocks as hb
from hamblocks.testing import LayerDims, parametrize_with_checks
from hamblocks.testing.ops import OPS


def trained() -> hb.TargetFraction:
    controller = hb.TargetFraction(0.5)
    controller.set_threshold(0.4)
    return controller


@pytest.mark.slow
@parametrize_with_checks(ops=list(OPS))
def test_ops(check: Any) -> None:
    check()


@parametrize_with_checks(
    gates=[
        hb.PredictionError(),
        hb.PredictionError("relative_l2"),
        hb.PredictionError("l2"),
        hb.LearnedRouter(),
        hb.LearnedRouter(3),
        hb.LearnedRouter(gradient="straight_through"),
        hb.CommittedWrite(),
        hb.RecallError(),
        hb.PredictionEntropy(7),
        hb.GivenScore(),
        hb.KeyNorm(),
        hb.ValueNorm(),
        hb.RandomGate(1),
        hb.RandomGate(1, per="position", heads="own"),
        hb.PeriodicGate(3, 1),
        hb.SharedGate(hb.LearnedRouter()),
        hb.SharedGate(hb.PredictionError()),
        hb.WeightedSum([hb.PredictionError(), hb.SharedGate(hb.PredictionError())], [1.0, -0.5]),
        hb.WeightedSum(
            [
                hb.PredictionError("l2"),
                hb.CommittedWrite(),
                hb.LearnedRouter(3),
                hb.LearnedRouter(gradient="straight_through"),
                hb.PredictionEntropy(5),
                hb.RandomGate(2),
            ],
            [1.0, 0.5, 0.1, 0.1, 1.0, 0.01],
        ),
        Parity(),
        Loudness(),
    ],
    controllers=[
        hb.FixedThreshold(0.5),
        hb.FixedThreshold(math.inf),
        hb.TargetFraction(0.25),
        hb.TargetFraction(1.0),
        trained(),
        hb.AnnealedFraction(0.3, 5, begin=2),
        hb.AnnealedFraction(0.25, 3, freeze_at=150, rate=0.5),
        hb.ElasticFraction(),
        hb.ElasticFraction(0.0, 0.6, seed=3, begin=2, spacing="uniform"),
    ],
    combiners=[
        hb.GatedSum(),
        hb.SoftmaxMix(),
        hb.GatedSum(output_gate=True, read_norm=False),
        hb.ScaledSum(),
        hb.ScaledSum(bias=True, read_norm=False),
        hb.ScaledSum(start="memory", norm_eps=1e-3, memory_gate="silu"),
        hb.ScaledSum(bias=True, memory_gate="sigmoid", attention_gate="sigmoid"),
    ],
    query_gates=[
        hb.ThresholdQueries(hb.PredictionError(), 0.9),
        hb.ThresholdQueries(hb.LearnedRouter(), 0.0, window=2),
        hb.ThresholdQueries(hb.LearnedRouter(gradient="straight_through"), 0.0),
        hb.ThresholdQueries(hb.GivenScore(), 0.0),
        hb.ThresholdQueries(Parity(), hb.FixedThreshold(0.5)),
    ],
)
def test_small_parts(check: Any) -> None:
    check()


@pytest.mark.slow
@parametrize_with_checks(
    selectors=[
        hb.Threshold(0.25),
        hb.Threshold(trained()),
        hb.Threshold(hb.AnnealedFraction(0.5, 2)),
        hb.Threshold(hb.ElasticFraction(0.2)),
        hb.Window(3),
        hb.Window(0),
        hb.FirstTokens(2),
        hb.HeadThresholds([0.25]) | hb.Window(3),
        hb.TopK(3),
        hb.TopK(0),
        hb.Threshold(0.25) | hb.Window(3),
        hb.TopK(4) & hb.Threshold(0.25),
        (hb.TopK(4) | hb.TopK(2)) & (hb.Window(7) | hb.Threshold(0.5)),
        AtLeast(0.25),
        Smallest(3),
        hb.TopK(3, delay=2),
        hb.TopK(2, delay=100) & hb.Window(9),
        hb.PromptFraction(0.4, 7),
        hb.PromptFraction(0.5, 5) & (hb.FirstTokens(5) | hb.Window(3)),
        hb.PromptFraction(0.0, 3),
        hb.PromptFraction(1.0, 4),
        hb.SublinearGrowth(0.5),
        hb.SublinearGrowth(0.7, 1.5, max_tokens=9) & hb.Window(6),
        hb.ErrorMass(0.6, 100),
        hb.ErrorMass(0.9, 3) | hb.Window(2),
        hb.Cooldown(hb.Threshold(0.25), 3),
        hb.Cooldown(hb.Threshold(trained()) | hb.TopK(2, delay=1), 2),
        hb.Budget(hb.Threshold(0.25) | hb.Window(4), 3),
        hb.Budget(hb.TopK(4, delay=2), 2) | hb.FirstTokens(1),
        hb.Budget(hb.Threshold(0.25) & hb.Window(5), 3, leaves="lowest"),
        hb.Budget(hb.Cooldown(hb.TopK(4), 2) | hb.Window(2), 2, leaves="lowest"),
    ]
)
def test_selectors(check: Any) -> None:
    check()


@pytest.mark.slow
@parametrize_with_checks(
    memories=[
        hb.GatedDeltaMemory(),
        hb.GatedDeltaMemory(allow_neg_eigval=True, impl="reference"),
        hb.DeltaMemory(),
        hb.DeltaMemory(conv_size=1, allow_neg_eigval=True),
        hb.GatedDeltaMemory(2, projections="own", num_heads=6, head_dim=4, expand_v=0.5),
        hb.GatedDeltaMemory(
            2, projections="own", num_heads=6, num_k_heads=2, head_dim=4, qk_l2norm_eps=1e-6
        ),
        hb.UnstoredMemory(hb.GatedDeltaMemory(2)),
    ],
    attentions=[
        hb.SelectedAttention(),
        hb.SelectedAttention(rope_theta=None, qk_norm=False),
        hb.SelectedAttention(impl="reference"),
        hb.SelectedAttention(conv_size=2),
        hb.SelectedAttention(partial_rotary_factor=0.5),
        hb.SelectedAttention(null_sink=True),
        hb.SelectedAttention(null_sink=True, impl="reference"),
        hb.SelectedAttention(conv_size=3, conv_values=True, qk_norm=False),
    ],
)
def test_memory_and_attention(check: Any) -> None:
    check()


@parametrize_with_checks(combiners=[Sum()], dims=LayerDims(8, 2, 1, 4))
def test_a_combiner_of_one_width(check: Any) -> None:
    check()


QUICK = ("threshold", "delta-relative-topk", "router-and", "users-loudness")
"""Layers that `make quick` runs too: both memories, a ledger, a logit bias, parts of a user."""


def layers(names: Any) -> dict[str, hb.HAMLayer]:
    return {name: parts_cases.build(name, Size(0, 2, 6, (2, 1))) for name in names}


@pytest.mark.slow
@parametrize_with_checks(layers=layers(name for name in CASES if name not in QUICK))
def test_layers_of_every_part(check: Any) -> None:
    check()


@parametrize_with_checks(
    layers=layers(QUICK)
    | {
        "no-memory": hb.HAMLayer(8, 2, memory=None),
        "no-attention": hb.HAMLayer(8, 2, attention=None),
        "as-in-fla": hb.HAMLayer(
            8,
            2,
            memory=hb.GatedDeltaMemory(projections="own", head_dim=2, expand_v=2),
            attention=None,
            combiner=hb.GatedSum(output_gate=True),
        ),
    }
)
def test_layers(check: Any) -> None:
    check()
