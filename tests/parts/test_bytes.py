"""Bytes of a state follow what is stored, and a limit to its pages holds."""

import subprocess
import sys

import pytest
import torch
from parts_cases import close, same

import hamblocks as hb


def layer_of(selector, seed=0, **parts):
    torch.manual_seed(seed)
    return hb.HAMLayer(32, 4, selector=selector, **parts).eval()


def prefilled(layer, tokens, *, sequences=1, piece=1024):
    state = layer.init_state(sequences)
    x = torch.randn(sequences, tokens, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in x.split(piece, 1):
            _, state, _ = layer.prefill(part, state)
    return state


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_bytes_follow_what_is_kept(fraction, shared):
    if shared:  # one stream per sequence, which serves all heads
        gate = hb.PeriodicGate(round(1 / fraction) if fraction else 10**6, 5)
        layer = layer_of(hb.Threshold(0.5), gate=gate)
    else:
        layer = layer_of(
            hb.Threshold(float("inf") if fraction == 0 else 1 - fraction),
            gate=hb.RandomGate(heads="own"),
        )
    state, tokens = prefilled(layer, 4096, sequences=2), 4096
    cache, sizes = state.cache, state.cache.sizes
    assert sizes.streams == (1 if shared else 4)
    streams, page_nbytes = 2 * sizes.streams, sizes.page_size * sizes.token_nbytes
    kept = cache.tokens.sum().item() / (tokens * cache.tokens.numel())
    assert kept == pytest.approx(fraction, abs=0.01)
    full = streams * tokens * sizes.token_nbytes
    ledgers = state.nbytes - cache.nbytes - sum(x.nbytes for x in (state.position, *state.memory))
    assert cache.nbytes + ledgers <= kept * full + streams * page_nbytes
    assert cache.nbytes >= kept * full
    assert cache.capacity_nbytes >= cache.nbytes
    assert cache.capacity_nbytes <= 1.6 * cache.nbytes + 2 * 17 * page_nbytes


def test_bytes_stop_growing_with_a_top_k():
    layer = layer_of(hb.TopK(100) | hb.Window(10))
    state, bytes_at = layer.init_state(2), []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(12):
            _, state, _ = layer.prefill(torch.randn(2, 256, 32, generator=generator), state)
            bytes_at.append((state.nbytes, state.cache.capacity_nbytes))
        # the window and the 100 best tokens overlap by a varying number of tokens
        assert len({used for used, _ in bytes_at[1:]}) <= 2
        assert len({capacity for _, capacity in bytes_at[3:]}) == 1
        for _ in range(40):
            _, state, _ = layer.decode(torch.randn(2, 32, generator=generator), state)
            assert state.nbytes <= max(bytes_at[1:])[0]


def test_slabs_go_back_to_the_system():
    layer = layer_of(KeepPrompt(4000))
    state = prefilled(layer, 4000, piece=500)
    full = state.cache.capacity_nbytes
    with torch.no_grad():
        _, state, _ = layer.prefill(torch.randn(1, 2, 32), state)
    assert (state.cache.tokens == 42).all()  # 40 of the prompt and the 2 after it
    assert state.cache.nbytes < 0.02 * full
    assert state.cache.capacity_nbytes < 0.5 * full


class KeepPrompt:
    """Stores a prompt of n tokens until it ends.

    Every hundredth token of the prompt, and every token after the prompt, is stored for good.
    """

    def __init__(self, n):
        self.n = n

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        keeps = (position % 100 == 0) | (position >= self.n)
        until = torch.where(keeps, hb.ops.NEVER, self.n + 1).to(torch.int32)
        return hb.Selection(until[..., None].expand(score.shape))


@torch.no_grad()
def test_too_few_pages_change_nothing():
    layer = layer_of(hb.Threshold(float("-inf")))
    x = torch.randn(2, 40, 32)
    state = layer.init_state(2, page_size=4, max_pages=2 * 4 * 5)
    _, state, _ = layer.prefill(x[:, :19], state)
    saved = state.state_dict()
    for call in (
        lambda: layer.prefill(x[:, 19:], state),
        lambda: state.reserve(2),
        lambda: state.reserve(1000),
    ):
        with pytest.raises(
            ValueError,
            match=r"^max_pages: expected at least \d+ pages \(40 in use and \d+ more\), got 40$",
        ):
            call()
        assert same(saved, state.state_dict())
    y, state, _ = layer.decode(x[:, 19], state)  # the 20th token still fits
    close(y, layer(x[:, :20]).y[:, -1], 1e-5)
    with pytest.raises(ValueError, match=r"^max_pages"):
        layer.decode(x[:, 20], state)


PREFILL = """
import resource, sys, torch
import hamblocks as hb
torch.manual_seed(0)
layer = hb.HAMLayer(128, 2, gate=hb.RandomGate(heads="own"), selector=hb.Threshold({tau})).eval()
state, x = layer.init_state(1), torch.randn(1, 4096, 128)
with torch.no_grad():
    layer.prefill(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range({pieces}):
        _, state, _ = layer.prefill(x, state)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown, state.cache.nbytes // 1024, int(state.position))
"""


@pytest.mark.slow
def test_memory_of_a_long_prefill_follows_what_is_kept():
    def peak(tau, pieces=15):
        code = PREFILL.format(tau=tau, pieces=pieces)
        run = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return [int(number) for number in run.stdout.split()]

    (nothing, _, tokens), (tenth, kept, _) = peak("float('inf')"), peak(0.9)
    assert tokens == 61_440
    everything = tokens * 2 * (2 * 64 * 4 + 8) // 1024
    assert kept == pytest.approx(everything / 10, rel=0.05)
    # the pages with their slack, and two copies of them while a piece is read
    assert tenth - nothing <= 5 * kept
    assert tenth < everything
