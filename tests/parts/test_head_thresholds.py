"""Thresholds per head: each head is a Threshold of its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hamblocks as hb
from hamblocks.ops import NEVER


@given(
    seed=st.integers(0, 2**32 - 1),
    taus=st.lists(st.sampled_from([-math.inf, -0.5, 0.0, 0.7, math.inf]), min_size=1, max_size=4),
)
def test_each_head_is_a_threshold_of_its_own(seed, taus):
    score = torch.randn(2, 7, len(taus), generator=torch.Generator().manual_seed(seed))
    position = torch.arange(3, 10, dtype=torch.int32).expand(2, 7)
    found = hb.HeadThresholds(taus)(score, position=position).evict_at
    apart = [
        hb.Threshold(tau)(column[..., None], position=position).evict_at
        for tau, column in zip(taus, score.unbind(-1), strict=True)
    ]
    assert torch.equal(found, torch.cat(apart, 2))


def test_bytes_follow_the_heads():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    sizes = {}
    for name, taus in (("all", [-math.inf] * 2), ("one", [-math.inf, math.inf])):
        layer = hb.HAMLayer(
            16,
            4,
            num_kv_heads=2,
            memory=None,
            gate=hb.ValueNorm(),
            selector=hb.HeadThresholds(taus) | hb.Window(4),
        )
        with torch.no_grad():
            state = layer.prefill(x, layer.init_state(1, page_size=4)).state
        sizes[name] = state.cache.pages_nbytes
        assert state.cache.tokens.tolist() == [[64, 64 if name == "all" else 3]]
    assert sizes["one"] == sizes["all"] * (16 + 1) // 32


def test_bad_thresholds_are_named():
    for taus in ([], "ab", 0.5, None):
        with pytest.raises(ValueError, match=r"^taus: expected a list of one or more numbers"):
            hb.HeadThresholds(taus)
    with pytest.raises(ValueError, match=r"^taus\[1\]: expected a number that is not NaN"):
        hb.HeadThresholds([0.0, math.nan])
    with pytest.raises(ValueError, match=r"^score: expected 2 heads, one for each of taus, got 3"):
        hb.HeadThresholds([0.0, 1.0])(torch.zeros(1, 2, 3))
    one = hb.HeadThresholds([0.0])(torch.zeros(1, 2, 3)).evict_at
    assert torch.equal(one, torch.full((1, 2, 3), NEVER, dtype=torch.int32))
