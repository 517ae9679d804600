"""One decoded token of a layer takes few launches on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launched import chosen_as_on_a_gpu, noted, without_values

import hamblocks as hb

# These bounds only go down: whoever makes decoding cheaper lowers them, and nobody raises them.
MOST = {"threshold": 30, "topk": 25}
SELECTORS = {
    "threshold": lambda: hb.Threshold(hb.TargetFraction(0.5)) | hb.Window(16),
    "topk": lambda: hb.TopK(16),
}


RANDOM_GATE = 38
"""Launches more with `RandomGate`, which hashes positions, as `benchmarks/gpu.py` decodes."""


def decoded(selector: Any, gate: Any = None) -> list[str]:
    """What a decoded token of two sequences launches, with pages reserved."""
    torch.manual_seed(0)
    gate = hb.PredictionError() if gate is None else gate
    layer = hb.HAMLayer(256, 4, num_kv_heads=2, gate=gate, selector=selector)
    layer = layer.eval().to(torch.bfloat16)
    x = torch.randn(2, 40, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        state = layer.prefill(x).state
        state.reserve(8)
        with chosen_as_on_a_gpu(), without_values():
            with noted():  # what is made once is made here
                state = layer.decode(x[:, 0], state).state
            with noted() as launches:
                layer.decode(x[:, 0], state)
    return launches.names


@pytest.mark.parametrize("selector", MOST)
def test_a_decoded_token_launches_few_kernels(selector: str) -> None:
    names = decoded(SELECTORS[selector]())
    assert len(names) <= MOST[selector], names


def test_a_random_gate_costs_its_hash() -> None:
    gate = hb.RandomGate(per="position", heads="own")
    counts = [len(decoded(hb.Threshold(0.9), one)) for one in (None, gate)]
    assert counts[1] - counts[0] <= RANDOM_GATE
