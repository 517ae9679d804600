"""Laws that every layer obeys, whatever its parts."""

import math

import pytest
import torch
from parts_cases import (
    CASES,
    HEADS,
    Size,
    build,
    close,
    everyone_sees,
    inputs,
    over_sizes,
    plain,
    sees,
    tensors,
)

import hamblocks as hb
import hamblocks.keys
from hamblocks.ops import NEVER
from hamblocks_ops.selected_attention import AttentionOutput

every_case = pytest.mark.parametrize("case", CASES)


@every_case
@over_sizes()
@torch.no_grad()
def test_layer_is_memory_and_attention_over_what_it_stored(case, size):
    layer, x = build(case, size), inputs(size)
    result = layer(x)
    kv_heads = size.heads[1]
    for n in range(size.batch):
        oracle = plain(layer, x[n], sees(result.stats.evict_at[n], kv_heads))
        close(result.y[n], oracle.y)
        gate = getattr(layer.gate, "gate", layer.gate)
        if isinstance(gate, hb.PredictionError):
            prediction = oracle.v - oracle.residual
            score = {
                "cosine": 1 - torch.cosine_similarity(prediction, oracle.v, dim=-1, eps=1e-30),
                "relative_l2": oracle.residual.norm(dim=-1) / oracle.v.norm(dim=-1),
                "l2": oracle.residual.square().mean(-1),
            }[gate.metric]
            heads = result.stats.score.shape[2]
            error = (result.stats.score[n] - score.unflatten(1, (heads, -1)).mean(-1)).abs()
            # the prediction v - residual carries the rounding of v: where the prediction is small,
            # that rounding limits how well its direction, and so the cosine, is known
            blur = (
                torch.finfo(prediction.dtype).eps * oracle.v.norm(dim=-1) / prediction.norm(dim=-1)
            )
            blur = (
                blur.where(prediction.norm(dim=-1) > 0, 0)
                if gate.metric == "cosine"
                else torch.zeros_like(blur)
            )
            assert (error <= 1e-10 + 32 * blur.unflatten(1, (heads, -1)).mean(-1)).all()


@pytest.mark.slow
@every_case
@over_sizes(share=3)
@torch.no_grad()
def test_threshold_at_minus_infinity_is_full_attention_and_at_infinity_none(case, size):
    layer, x = build(case, size), inputs(size)
    everything = everyone_sees(size.tokens, size.heads[1])
    reads = []  # a query gate may run attention twice in a call, or not at all
    # the part is called to prepare the tokens too, which gives a tuple
    layer.attention.register_forward_hook(
        lambda *call: reads.append(call[-1]) if isinstance(call[-1], torch.Tensor) else None
    )
    for tau, visible, evict in (
        (-math.inf, everything, NEVER),
        (math.inf, torch.zeros_like(everything), None),
    ):
        layer.selector = hb.Threshold(tau)
        reads.clear()
        result = layer(x)
        expected = result.stats.position[..., None] if evict is None else torch.tensor(evict)
        assert (result.stats.evict_at == expected).all()
        for n in range(size.batch):
            close(result.y[n], plain(layer, x[n], visible).y)
        if reads:  # the layer calls no part without a token
            assert any(read.any() for read in reads) == (tau < 0)


@pytest.mark.parametrize("case", ["threshold", "delta-relative-topk", "router-and"])
@over_sizes(share=2)
@torch.no_grad()
def test_float32_is_near_float64(case, size):
    # Rounding may move a score across tau, so the float32 layer replays the decisions of float64.
    layer, x = build(case, size), inputs(size)
    exact = layer(x)
    layer.float().selector.forward = lambda *_, **__: hb.Selection(exact.stats.evict_at)
    close(layer(x.float()).y.double(), exact.y, 2e-4)


@pytest.mark.parametrize("case", ["delta-relative-topk", "shared-router-tree"])
def test_gradients_flow_through_the_memory_of_a_state_and_not_through_its_cache(case, monkeypatch):
    size = Size(0, 2, 12, (4, 2))
    layer, x = build(case, size), inputs(size)
    weights = list(layer.parameters())

    def gradients(y):
        return torch.autograd.grad(y.sin().sum(), weights, allow_unused=True)

    def in_pieces():
        state, pieces = layer.init_state(2), []
        for piece in x.split([5, 4, 3], 1):
            y, state, _ = layer(piece, state=state)
            assert not any(
                stored.requires_grad for stored in state.cache.stored() if stored is not None
            )
            pieces.append(y)
        return torch.cat(pieces, 1)

    selector, layer.selector = layer.selector, hb.Threshold(math.inf)
    for one, other in zip(gradients(in_pieces()), gradients(layer(x).y), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other)
    # stored keys and values are constants: the expected gradient is that of one pass in which keys
    # and values of earlier pieces are detached
    layer.selector = selector
    close(in_pieces(), layer(x).y)

    def detached(q, k, v, evict_at, *, logit_bias, **rest):
        reads = []
        for begin, end in ((0, 5), (5, 9), (9, 12)):
            past = (
                None if x is None else torch.cat([x[:, :begin].detach(), x[:, begin:]], 1)
                for x in (k, v, logit_bias)
            )
            k_, v_, bias = past
            reads.append(attend(q, k_, v_, evict_at, logit_bias=bias, **rest).out[:, begin:end])
        return AttentionOutput(torch.cat(reads, 1), None)

    pieces = gradients(in_pieces())
    attend = hamblocks.keys.selected_attention
    monkeypatch.setattr(hamblocks.keys, "selected_attention", detached)
    whole = gradients(layer(x).y)
    for one, other in zip(pieces, whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_cases_neither_keep_all_nor_drop_all(case):
    # a layer that keeps all or nothing would pass the laws above without deciding anything
    layer, x = build(case, Size(0, 2, 14, (4, 2))), inputs(Size(0, 2, 14, (4, 2)))
    evict_at = layer(x).stats.evict_at
    position = torch.arange(14)[None, :, None]
    stored = (position < 13) & (evict_at > position)
    assert stored.any()
    assert not (stored & (evict_at == NEVER))[position.expand_as(stored) < 13].all()


@every_case
@torch.no_grad()
def test_scores_and_the_memory_stay_wide_in_bfloat16(case):
    size = Size(0, 1, 6, HEADS[0])
    layer = build(case, size, torch.bfloat16)
    y, state, stats = layer(inputs(size, torch.bfloat16), state=layer.init_state(1))
    assert y.dtype == torch.bfloat16
    assert stats.score.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in tensors(state.memory) if x.dim() == 4)
