"""A score from outside: a layer hands it to its gates, and checks it first."""

from __future__ import annotations

import pytest
import torch
from parts_cases import close

import hamblocks as hb


class Given:
    """A gate that scores by what the caller gave."""

    def __call__(self, x, trace):
        return hb.GateOutput(trace.given)


def layer_of(**parts):
    torch.manual_seed(0)
    parts = {"gate": Given(), "selector": hb.Threshold(0.5)} | parts
    return hb.HAMLayer(8, 2, **parts).eval()


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).float()[..., None]


@torch.no_grad()
def test_the_gate_sees_what_was_given():
    result = layer_of()(X, given_score=LABELS)
    assert torch.equal(result.stats.score, LABELS)
    position = result.stats.position[..., None]
    assert torch.equal(result.stats.evict_at > position, LABELS.bool())


@torch.no_grad()
def test_pieces_and_decoding_get_their_part():
    layer = layer_of()
    whole = layer(X, given_score=LABELS).y
    first = layer.prefill(X[:, :4], given_score=LABELS[:, :4])
    then = layer.decode(X[:, 4], first.state, given_score=LABELS[:, 4])
    last = layer.decode(X[:, 5], then.state, given_score=LABELS[:, 5])
    close(torch.cat([first.y, then.y[:, None], last.y[:, None]], 1), whole, 1e-5)


@torch.no_grad()
def test_a_decoder_hands_it_to_every_layer():
    torch.manual_seed(0)
    model = hb.Decoder(16, 2, lambda _: layer_of()).eval()
    tokens = torch.randint(16, (2, 6))
    stats = model(tokens, given_score=LABELS).stats
    assert all(torch.equal(one.score, LABELS) for one in stats)


@pytest.mark.parametrize(
    "given",
    [LABELS[:, :5], LABELS[..., 0], LABELS.long(), LABELS.expand(-1, -1, 3), [1.0]],
    ids=["tokens", "dimensions", "dtype", "heads", "type"],
)
def test_a_wrong_one_is_named(given):
    with pytest.raises(ValueError, match=r"^given_score: expected .*, got "):
        layer_of()(X, given_score=given)
