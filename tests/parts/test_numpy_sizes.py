"""Sizes and thresholds out of numpy work as those of Python do."""

import numpy as np
import pytest
import torch

import hamblocks as hb
from hamblocks.protocols import check_count

MAKERS = {
    "sizes": lambda i, f: hb.HAMLayer(
        i(16), i(4), num_kv_heads=i(2), head_dim=i(4), selector=hb.Window(i(4))
    ),
    "top-k": lambda i, f: hb.HAMLayer(
        16, 4, selector=hb.TopK(i(3)) | hb.Window(i(2)) | hb.FirstTokens(i(1))
    ),
    "threshold": lambda i, f: hb.HAMLayer(16, 4, selector=hb.Threshold(f(0.5))),
    "target": lambda i, f: hb.HAMLayer(
        16, 4, selector=hb.Threshold(hb.TargetFraction(f(0.5), rate=f(0.25)))
    ),
    "annealed": lambda i, f: hb.HAMLayer(
        16, 4, selector=hb.Threshold(hb.AnnealedFraction(f(0.5), i(3), begin=i(0), freeze_at=i(9)))
    ),
    "elastic": lambda i, f: hb.HAMLayer(
        16, 4, selector=hb.Threshold(hb.ElasticFraction(f(0.25), f(1), seed=i(3), begin=i(1)))
    ),
    "memory": lambda i, f: hb.HAMLayer(
        16, 4, memory=hb.GatedDeltaMemory(conv_size=i(2)), selector=hb.Window(2)
    ),
    "gates": lambda i, f: hb.HAMLayer(
        16, 4, gate=hb.PeriodicGate(i(3), i(1)), selector=hb.Threshold(f(0.5))
    ),
    "rope": lambda i, f: hb.HAMLayer(
        16,
        4,
        attention=hb.SelectedAttention(
            rope_theta=f(5000),
            rope_scaling={
                "rope_type": "yarn",
                "factor": f(2),
                "original_max_position_embeddings": i(8),
                "truncate": False,
            },
            conv_size=i(2),
        ),
        selector=hb.TopK(i(2), delay=i(3)),
    ),
    "own projections": lambda i, f: hb.HAMLayer(
        16,
        4,
        memory=hb.GatedDeltaMemory(
            conv_size=[i(2), i(1), i(3)], projections="own", num_heads=i(2), head_dim=i(6)
        ),
        selector=hb.Window(2),
    ),
    "sum": lambda i, f: hb.HAMLayer(
        16,
        4,
        gate=hb.WeightedSum([hb.RandomGate(i(3)), hb.KeyNorm()], [f(0.5), i(1)]),
        combiner=hb.ScaledSum(),
        selector=hb.HeadThresholds([f(0.5), f(0.25), f(0.5), f(0)]),
    ),
    "queries": lambda i, f: hb.HAMLayer(
        16,
        4,
        selector=hb.Window(8),
        query_gate=hb.ThresholdQueries(hb.LearnedRouter(i(5)), f(0.25), i(2)),
    ),
    "selectors": lambda i, f: hb.HAMLayer(
        16,
        4,
        selector=hb.Budget(hb.Threshold(f(0.25)), i(6))
        | hb.Cooldown(hb.Threshold(f(0.5)), i(3))
        | hb.PromptFraction(f(0.25), i(9))
        | hb.ErrorMass(f(0.5), i(4))
        | hb.SublinearGrowth(f(0.5), f(1.5), i(64)),
    ),
}


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_layer_is_that_of_plain_numbers(maker, integer):
    results = []
    for i, f in ((int, float), (integer, np.float32)):
        torch.manual_seed(0)
        layer = MAKERS[maker](i, f)
        x = torch.randn(2, 20, 16)
        for _ in range(2):
            layer(x).y.sum().backward()
            hb.step_controllers(layer)
        layer.eval()
        out = layer.prefill(x[:, :12])
        y = [out.y]
        for t in range(12, 16):
            out = layer.decode(x[:, t], out.state)
            y.append(out.y[:, None])
        results.append((layer, torch.cat(y, 1)))
    (plain, expected), (layer, got) = results
    assert torch.equal(got, expected)
    assert layer.dims == plain.dims
    assert all(type(value) in (int, bool, type(None)) for value in layer.dims)
    # a part keeps plain numbers: they are saved as JSON, and numpy's overflow where these do not
    for module in layer.modules():
        assert not [name for name, kept in vars(module).items() if isinstance(kept, np.generic)]


def test_a_decoder():
    model = hb.Decoder(np.int64(9), np.int64(2), lambda i: hb.HAMLayer(8, 2, selector=hb.Window(2)))
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 9)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), 3])
def test_a_count_is_returned_as_an_int(value):
    count = check_count("n", value, 3)
    assert type(count) is int
    assert count == 3


@pytest.mark.parametrize(
    "value", [np.int64(2), np.float64(3), np.bool_(True), True, 3.0, "3", None, np.array([3])]
)
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=r"^n: expected an integer >= 3, got"):
        check_count("n", value, 3)
