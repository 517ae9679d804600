"""What a batch row gives does not depend on the other rows, in one pass and from a cache."""

from __future__ import annotations

import pytest
import torch
from parts_cases import close

import hamblocks as hb

LAYERS = {
    "threshold": lambda: {"selector": hb.Threshold(0.4) | hb.Window(2)},
    "topk": lambda: {"selector": hb.TopK(4) | hb.Window(2), "memory": hb.DeltaMemory()},
    "budget": lambda: {"selector": hb.Budget(hb.Threshold(0.3), 5, leaves="lowest")},
    "router": lambda: {
        "selector": hb.TopK(3) & hb.Threshold(-0.1),
        "gate": hb.LearnedRouter(),
        "attention": hb.SelectedAttention(conv_size=2, null_sink=True),
    },
    "random": lambda: {"selector": hb.Threshold(0.5), "gate": hb.RandomGate(1)},
    "queries": lambda: {
        "selector": hb.Window(4),
        "query_gate": hb.ThresholdQueries(hb.LearnedRouter(), 0.0, 2),
    },
    "memory alone": lambda: {"attention": None},
}
PROMPT, STEPS = 11, 3


def layer_of(name, dtype):
    torch.manual_seed(0)
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, **LAYERS[name]())
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return layer.to(dtype).eval()


@torch.no_grad()
def results(layer, x):
    """y, scores and lifetimes of one pass, of a prefill and of decoded tokens, `[N, ...]` each."""
    calls = [layer(x)]
    state = layer.init_state(len(x), page_size=3)
    calls.append(layer.prefill(x[:, :PROMPT], state))
    for token in x[:, PROMPT:].unbind(1):
        calls.append(layer.decode(token, calls[-1].state))
    return [(call.y, call.stats.score, call.stats.evict_at) for call in calls]


def compare(row, other, *, exact):
    for (y, score, evict_at), (y2, score2, evict_at2) in zip(row, other, strict=True):
        if evict_at is not None:
            assert torch.equal(evict_at, evict_at2)
            if exact:
                assert torch.equal(score, score2)
            close(score, score2, 1e-10)
        close(y, y2, 1e-10 if y.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_other_rows_of_a_batch_of_the_same_shape(name, dtype):
    """Scores and lifetimes are the same bits; attention's sums may follow another list of pages."""
    layer, x = layer_of(name, dtype), torch.randn(4, PROMPT + STEPS, 16, dtype=dtype)
    changed = torch.randn_like(x) * 3
    changed[2] = x[2]
    rows = [
        [tuple(None if one is None else one[2] for one in call) for call in results(layer, given)]
        for given in (x, changed)
    ]
    compare(*rows, exact=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_alone_and_in_another_order(name):
    """In float64 decisions are equal; a kernel may sum a batch of another shape in another order."""
    layer, x = layer_of(name, torch.float64), torch.randn(4, PROMPT + STEPS, 16).double()
    together = results(layer, x)
    order = [3, 1, 0, 2]
    for rows in (order, [2], [1, 1]):
        row = [tuple(None if one is None else one[rows] for one in call) for call in together]
        compare(results(layer, x[rows]), row, exact=False)
