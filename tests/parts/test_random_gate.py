"""Random scores: a hash, uniform, and independent of everything that a control must not know."""

import pytest
import torch
from gate_cases import trace_of
from hypothesis import example, given
from hypothesis import strategies as st

import hamblocks as hb


def content(x):
    """What `RandomGate` reads of x: the signs of the first 16 entries, as a number."""
    return [sum(2**i for i, entry in enumerate(row[:16].tolist()) if entry > 0) for row in x]


def mixed(word):
    """The finalizer of MurmurHash3."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


@pytest.mark.parametrize("per", ["sequence", "position"])
@given(
    seed=st.integers(0, 2**40),
    begin=st.integers(0, 2**20),
    width=st.sampled_from([1, 12, 40]),
    tokens=st.integers(1, 12),
)
def test_random_scores_are_hashes(per, seed, begin, width, tokens):
    x = torch.randn(1, tokens, width)
    trace = trace_of(0, 1, tokens, heads=3, begin=begin)
    own = hb.RandomGate(seed, per=per, heads="own")(x, trace).score
    assert own.dtype == torch.float32
    for t, signs in enumerate(content(x[0])):
        for head in range(3):
            word = mixed(mixed(mixed(seed % 2**32) ^ head) ^ begin + t)
            word = mixed(word ^ signs) if per == "sequence" else word
            assert own[0, t, head] == (word >> 8) / 2**24
    shared = hb.RandomGate(seed, per=per)(x, trace).score
    assert torch.equal(shared, own[..., :1])


@pytest.mark.parametrize("per", ["sequence", "position"])
@given(batch=st.integers(1, 3), tokens=st.integers(1, 20), cut=st.integers(1, 20))
@example(batch=1, tokens=1, cut=1)
def test_random_scores_do_not_depend_on_pieces_and_neighbours(per, batch, tokens, cut):
    gate, x, cut = hb.RandomGate(3, per=per), torch.randn(batch, tokens, 12), min(cut, tokens)
    whole = gate(x, trace_of(0, batch, tokens)).score
    pieces = [
        gate(x[:, :cut], trace_of(1, batch, cut)).score,
        gate(x[:, cut:], trace_of(2, batch, tokens - cut, begin=cut)).score,
    ]
    assert torch.equal(whole, torch.cat(pieces, 1))
    for n in range(batch):
        alone = gate(x[n : n + 1], trace_of(3, 1, tokens)).score
        assert torch.equal(whole[n : n + 1], alone)
    if per == "position":
        assert torch.equal(whole, whole[:1].expand_as(whole))
    # a change of x that keeps the signs changes nothing
    assert torch.equal(whole, gate(x * (1 + 1e-3), trace_of(0, batch, tokens)).score)


def bins_are_even(column):
    """Whether 16 bins are filled evenly, within 5.5 standard deviations."""
    expected = column.numel() / 16
    return ((column.histc(16, 0, 1) - expected).abs() < 5.5 * expected**0.5).all()


def test_random_scores_are_uniform_and_independent():
    tokens = 20_000
    torch.manual_seed(0)
    x, trace = torch.randn(3, tokens, 24), trace_of(0, 3, tokens)
    columns = [
        score for seed in (0, 1, 2**40) for score in hb.RandomGate(seed)(x, trace).score[..., 0]
    ]
    # the same token everywhere still draws by its position
    columns.append(hb.RandomGate(5)(x[:1, :1].expand(1, tokens, 24), trace_of(0, 1, tokens)).score)
    heads = hb.RandomGate(6, per="position", heads="own")(x[:1], trace_of(0, 1, tokens)).score
    columns += [heads[..., head] for head in range(4)]
    columns = [column.flatten() for column in columns]
    for column in columns:
        assert column.min() >= 0
        assert column.max() < 1
        assert bins_are_even(column)
        assert column.unique().numel() > 0.99 * tokens
        assert abs(torch.corrcoef(torch.stack([column[1:], column[:-1]]))[0, 1]) < 0.04
    # 2**40 is seed 0 again: 32 bits count
    assert all(torch.equal(a, b) for a, b in zip(columns[:3], columns[6:9], strict=True))
    # sequences, seeds and heads draw independently
    between = torch.corrcoef(torch.stack(columns[:6] + columns[9:])) - torch.eye(11)
    assert between.abs().max() < 0.04
    # and the score says nothing of the token
    assert torch.corrcoef(torch.cat([columns[0][None], x[0].T]))[0, 1:].abs().max() < 0.04
