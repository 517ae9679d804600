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
        hb.RandomGate(1),
        hb.PeriodicGate(3, 1),
        hb.SharedGate(hb.LearnedRouter()),
        hb.SharedGate(hb.PredictionError()),
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
    combiners=[hb.GatedSum(), hb.SoftmaxMix()],
)
def test_small_parts(check: Any) -> None:
    check()


@parametrize_with_checks(
    selectors=[
        hb.Threshold(0.25),
        hb.Threshold(trained()),
        hb.Threshold(hb.AnnealedFraction(0.5, 2)),
        hb.Threshold(hb.ElasticFraction(0.2)),
        hb.Window(3),
        hb.Window(0),
        hb.FirstTokens(2),
        hb.TopK(3),
        hb.TopK(0),
        hb.Threshold(0.25) | hb.Window(3),
        hb.TopK(4) & hb.Threshold(0.25),
        (hb.TopK(4) | hb.TopK(2)) & (hb.Window(7) | hb.Threshold(0.5)),
        AtLeast(0.25),
        Smallest(3),
    ]
)
def test_selectors(check: Any) -> None:
    check()


@parametrize_with_checks(
    memories=[
        hb.GatedDeltaMemory(),
        hb.GatedDeltaMemory(allow_neg_eigval=True, impl="reference"),
        hb.DeltaMemory(),
        hb.DeltaMemory(conv_size=1, allow_neg_eigval=True),
    ],
    attentions=[
        hb.SelectedAttention(),
        hb.SelectedAttention(rope_theta=None, qk_norm=False),
        hb.SelectedAttention(impl="reference"),
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
    }
)
def test_layers(check: Any) -> None:
    check()
