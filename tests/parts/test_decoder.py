"""The decoder: pieces are one pass, layers may differ, and the stats count what is stored."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import CASES, SEEDS, close, cuts, same

import hamblocks as hb

LAYERS = ["threshold", "router-and", "shared-random", "shared-router-tree"]


def make(seed, names=LAYERS):
    torch.manual_seed(seed)
    model = hb.Decoder(
        13, len(names), lambda i: hb.HAMLayer(16, 4, num_kv_heads=2, **CASES[names[i]]())
    )
    return model.double().eval()


def draw_tokens(seed, *shape):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


@given(
    seed=SEEDS,
    batch=st.integers(1, 2),
    tokens=st.integers(0, 12),
    drawn=st.lists(st.integers(0, 12), max_size=4),
)
@example(seed=0, batch=2, tokens=12, drawn=[5, *range(5, 12)])
@example(seed=0, batch=1, tokens=0, drawn=[0])
@torch.no_grad()
def test_pieces_are_one_pass(seed, batch, tokens, drawn):
    model, text = make(seed), draw_tokens(seed, batch, tokens)
    whole, state, pieces = model(text), model.init_state(batch), []
    borders = cuts(tokens, drawn)
    for begin, end in itertools.pairwise(borders):
        logits, state, stats = model(text[:, begin:end], state=state)
        assert len(state) == len(stats) == len(LAYERS)
        pieces.append(logits)
    close(torch.cat(pieces, 1), whole.logits)
    assert whole.state is None


@given(seed=SEEDS, lengths=st.lists(st.integers(0, 8), min_size=1, max_size=3))
@example(seed=0, lengths=[0, 8, 0, 1])
@torch.no_grad()
def test_packed_is_one_by_one(seed, lengths):
    model, text = make(seed), draw_tokens(seed, 1, sum(lengths))
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = model(text, cu_seqlens=borders)
    alone = [model(row) for row in text.split(lengths, 1)]
    close(packed.logits, torch.cat([one.logits for one in alone], 1))
    # a token counts as kept if it is stored when its own sequence ends
    for layer, stats in enumerate(packed.stats):
        kept = sum(
            int((one.stats[layer].evict_at >= length).sum())
            for one, length in zip(alone, lengths, strict=True)
        )
        heads = stats.evict_at.shape[2]
        expected = kept / (sum(lengths) * heads) if sum(lengths) else 0.0
        assert stats.keep_fraction().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("selector", "fraction"),
    [
        (lambda: hb.Window(3), 3 / 10),
        (lambda: hb.TopK(4), 4 / 10),
        (lambda: hb.FirstTokens(1), 1 / 10),
        (lambda: hb.Window(0), 0.0),
        (lambda: hb.Threshold(float("-inf")), 1.0),
    ],
)
def test_keep_fraction_by_hand(selector, fraction):
    # what the last query still sees
    layer, x = hb.HAMLayer(8, 2, selector=selector()), torch.randn(2, 10, 8)
    whole = layer(x).stats.keep_fraction()
    assert whole.dtype == torch.float32
    assert whole.item() == pytest.approx(fraction)
    assert layer(x[:, :0]).stats.keep_fraction() == 0


def test_layers_are_made_by_index_and_keep_their_own_state():
    asked = []

    def layer(index):
        asked.append(index)
        return hb.HAMLayer(16, 2, selector=hb.Window(index + 1))

    model = hb.Decoder(13, 3, layer)
    assert asked == [0, 1, 2]
    _, state, _ = model(draw_tokens(0, 1, 9), state=model.init_state(1))
    # the query after the last sees width - 1 of the stored
    assert [s.cache.tokens.tolist() for s in state] == [[[0, 0]], [[1, 1]], [[2, 2]]]
    assert model.head.weight is model.embedding.weight


def test_loss_reaches_every_weight_that_acts():
    model = make(0).train()
    loss = torch.nn.functional.cross_entropy(
        model(draw_tokens(0, 2, 12)).logits.flatten(0, 1), draw_tokens(1, 24)
    )
    loss.backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters()
    )
    assert same(model(draw_tokens(0, 2, 12)), model(draw_tokens(0, 2, 12)))


@pytest.mark.slow
def test_traces_without_a_break():
    torch.compiler.reset()
    model, text = make(0, LAYERS[:2]), draw_tokens(0, 2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(text).logits, model(text).logits)
