"""A memory that is read for what attention does not store: what it needs, heads, saved states."""

import math

import pytest
import torch
from parts_cases import Size, build, close, inputs, tensors

import hamblocks as hb
from hamblocks.selectors import revises

SIZE = Size(0, 2, 12, (4, 2))


def layer_of(selector, **parts):
    torch.manual_seed(0)
    parts = {"memory": hb.UnstoredMemory(hb.DeltaMemory(2))} | parts
    return hb.HAMLayer(16, 4, num_kv_heads=2, selector=selector, **parts).double().eval()


@pytest.mark.parametrize(
    "selector",
    [
        lambda: hb.TopK(3),
        lambda: hb.TopK(3, delay=4),
        lambda: hb.Threshold(0.5) | hb.TopK(3),
        lambda: hb.Cooldown(hb.TopK(3), 2),
        lambda: hb.Budget(hb.Threshold(0.5), 3),
        lambda: hb.PromptFraction(0.5, 6),
        lambda: hb.ErrorMass(0.5, 6),
        lambda: hb.SublinearGrowth(0.5),
    ],
)
def test_a_selector_that_may_evict_what_it_stored_is_refused(selector):
    # such a token would be neither in the cache nor in the state
    assert revises(selector())
    with pytest.raises(ValueError, match=r"^selector: expected a selector that never revises"):
        layer_of(selector())


@pytest.mark.parametrize(
    "selector",
    [
        lambda: hb.Threshold(0.5) | hb.Window(3),
        lambda: hb.Threshold(0.5) & hb.FirstTokens(4),
        lambda: hb.Cooldown(hb.Threshold(0.5), 2) | hb.Window(1),
    ],
)
def test_a_selector_whose_lifetimes_are_final_is_taken(selector):
    assert not revises(selector())
    layer_of(selector())


def test_what_it_needs_is_named():
    with pytest.raises(ValueError, match=r"^selector: expected .*stored for good\), got none"):
        layer_of(None)
    with pytest.raises(ValueError, match=r"^selector: expected .*stored for good\), got none"):
        hb.HAMLayer(8, 2, memory=hb.UnstoredMemory(hb.DeltaMemory()), attention=None)
    for inner in (None, hb.DeltaMemory, hb.UnstoredMemory(hb.DeltaMemory())):
        with pytest.raises(ValueError, match=r"^inner: expected a DeltaMemory or GatedDeltaMemory"):
            hb.UnstoredMemory(inner)


@torch.no_grad()
def test_tokens_of_a_window_are_written_and_those_stored_for_good_are_not():
    x = inputs(SIZE)
    reads = []

    def reads_of(layer):
        layer.combiner.register_forward_pre_hook(lambda _, args: reads.append(args[1]))
        layer(x)
        return reads[-1]

    plain = reads_of(layer_of(hb.Window(5), memory=hb.DeltaMemory(2)))
    close(reads_of(layer_of(hb.Window(5))), plain)
    close(reads_of(layer_of(hb.Threshold(math.inf) | hb.Window(5))), plain)
    assert not reads_of(layer_of(hb.Threshold(-math.inf))).any()
    # the first four tokens are in the cache, and the state is that of the others
    late = reads_of(layer_of(hb.FirstTokens(4)))
    assert not late[:, :4].any()
    assert late[:, 4:].any()


@torch.no_grad()
def test_one_head_of_the_memory_serves_several_key_value_heads():
    # a head skips what all key/value heads that it serves store; here each stores other tokens
    torch.manual_seed(0)
    memory = hb.UnstoredMemory(hb.GatedDeltaMemory(1, projections="own", num_heads=1, head_dim=8))
    gate = hb.RandomGate(3, heads="own")
    layer = hb.HAMLayer(16, 2, memory=memory, gate=gate, selector=hb.Threshold(0.5)).double()
    x, skipped = inputs(Size(0, 2, 12, (4, 2))), []
    read = memory.read_unstored
    memory.read_unstored = lambda trace, stored, **rest: (
        skipped.append(stored) or read(trace, stored, **rest)
    )
    evict_at = layer(x).stats.evict_at
    both = (evict_at == hb.ops.NEVER).all(2, keepdim=True)
    assert both.any()
    assert not both.all()
    assert torch.equal(skipped[0], both)


def test_heads_that_divide_neither_way_are_refused():
    memory = hb.UnstoredMemory(hb.DeltaMemory(1, projections="own", num_heads=3))
    gate = hb.LearnedRouter()
    layer = hb.HAMLayer(16, 4, num_kv_heads=2, memory=memory, gate=gate, selector=hb.Threshold(0.5))
    with pytest.raises(ValueError, match=r"^num_heads of the memory: expected one decision per"):
        layer(torch.randn(1, 3, 16))


@torch.no_grad()
def test_a_saved_state_goes_on_in_a_layer_and_forgets_on_reset():
    layer, x = build("memory-of-the-rest", SIZE), inputs(SIZE)
    state = layer.prefill(x[:, :7], layer.init_state(2)).state
    loaded = layer.load_state(state.state_dict())
    close(layer.prefill(x[:, 7:], loaded).y, layer(x).y[:, 7:])
    state = layer.reset(layer.prefill(x[:, :7]).state, torch.tensor([True, False]))
    assert not any(one[0].any() for one in tensors(state.memory))
    close(layer.prefill(x[:1].expand(2, -1, -1), state).y[0], layer(x[:1]).y[0])
