"""What every layer obeys, whatever parts it is made of."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import (
    CASES,
    HEADS,
    SEEDS,
    Size,
    build,
    close,
    content,
    cuts,
    everyone_sees,
    inputs,
    over_sizes,
    pack,
    plain,
    rows_of,
    same,
    sees,
    tensors,
)

import hamblocks as hb
import hamblocks.attention
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
            # v - residual leaves a small prediction with the rounding of v: the cosine knows its direction that well
            blur = torch.finfo(prediction.dtype).eps * oracle.v.norm(dim=-1) / prediction.norm(dim=-1)
            blur = blur.where(prediction.norm(dim=-1) > 0, 0) if gate.metric == "cosine" else torch.zeros_like(blur)
            assert (error <= 1e-10 + 32 * blur.unflatten(1, (heads, -1)).mean(-1)).all()


@every_case
@over_sizes(share=3)
@torch.no_grad()
def test_threshold_at_minus_infinity_is_full_attention_and_at_infinity_none(case, size):
    layer, x = build(case, size), inputs(size)
    everything = everyone_sees(size.tokens, size.heads[1])
    read = []
    layer.attention.register_forward_hook(lambda *call: read.append(call[-1][0]))
    for tau, visible, evict in ((-math.inf, everything, NEVER), (math.inf, torch.zeros_like(everything), None)):
        layer.selector = hb.Threshold(tau)
        result = layer(x)
        expected = result.stats.position[..., None] if evict is None else torch.tensor(evict)
        assert (result.stats.evict_at == expected).all()
        for n in range(size.batch):
            close(result.y[n], plain(layer, x[n], visible).y)
    assert not read[1].any()
    assert not size.tokens or read[0].any()


@every_case
@over_sizes(share=2, t=st.integers(0, 14))
@torch.no_grad()
def test_later_inputs_change_nothing_earlier(case, size, t):
    layer, x = build(case, size), inputs(size)
    t = min(t, size.tokens)
    changed = torch.cat([x[:, :t], -3 * x[:, t:].flip(1) + 1], 1)
    before, after = layer(x), layer(changed)
    close(before.y[:, :t], after.y[:, :t])
    close(before.stats.score[:, :t], after.stats.score[:, :t])
    assert torch.equal(before.stats.evict_at[:, :t].clamp(max=t), after.stats.evict_at[:, :t].clamp(max=t))


@every_case
@over_sizes(share=2, t=st.integers(0, 14))
def test_earlier_outputs_have_no_gradient_from_later_inputs(case, size, t):
    layer, x = build(case, size), inputs(size).requires_grad_()
    t = min(t, size.tokens)
    y = layer(x).y[:, :t]
    (grad,) = torch.autograd.grad((y * torch.linspace(1, 2, y.numel()).view_as(y)).sum(), x)
    assert not grad[:, t:].any()
    assert grad.isfinite().all()
    assert t == 0 or grad[:, :t].any()


@every_case
@given(seed=SEEDS, heads=st.sampled_from(HEADS), lengths=st.lists(st.integers(0, 9), max_size=4))
@example(seed=0, heads=(2, 1), lengths=[])
@example(seed=0, heads=(2, 1), lengths=[0])
@example(seed=0, heads=(4, 2), lengths=[0, 1, 9, 0, 0, 4, 0])
def test_packed_is_one_by_one(case, seed, heads, lengths):
    layer = build(case, Size(seed, 1, 0, heads))
    rows = rows_of(seed, lengths, 4 * heads[0])
    packed, borders = (
        pack(rows) if rows else (torch.zeros(1, 0, 4 * heads[0], dtype=torch.float64), torch.zeros(1).int())
    )
    packed.requires_grad_()
    result = layer(packed, cu_seqlens=borders)
    (grad,) = torch.autograd.grad((result.y * torch.arange(packed.shape[2])).sum(), packed)
    for n, row in enumerate(rows):
        own = slice(borders[n], borders[n + 1])
        row.requires_grad_()
        alone = layer(row[None])
        close(result.y[:, own], alone.y)
        close(result.stats.score[:, own], alone.stats.score)
        assert torch.equal(result.stats.evict_at[:, own], alone.stats.evict_at)
        close(grad[:, own], torch.autograd.grad((alone.y * torch.arange(packed.shape[2])).sum(), row)[0][None])
    kept = [layer(row[None]).stats.keep_fraction() * len(row) for row in rows]
    expected = sum(kept) / sum(lengths) if sum(lengths) else 0.0
    assert result.stats.keep_fraction().item() == pytest.approx(float(expected), abs=1e-6)


def check_stream(layer, rows, steps):
    """Each step is (y, score, evict_at, tokens seen, what is stored), per row, and must be what one pass gives."""
    for n, row in enumerate(rows):
        full = layer(row[None])
        seen = 0
        for y, score, evict_at, position_of, stored in steps:
            begin, seen = seen, seen + len(y[n])
            close(y[n], full.y[0, begin:seen])
            close(score[n], full.stats.score[0, begin:seen])
            # what one pass over all that was seen decides: lifetimes lowered later show in the cache
            known = layer.selector(full.stats.score[:, :seen]).evict_at[0]
            assert torch.equal(evict_at[n], known[begin:])
            assert position_of[n] == seen
            known = known.expand(-1, layer.dims.num_kv_heads)
            for head in range(layer.dims.num_kv_heads):
                alive = (known[:, head] > seen).nonzero()[:, 0]
                position, until, tokens = stored[n][head]
                assert position.tolist() == alive.tolist()
                assert torch.equal(until, known[alive, head])
                assert tokens == len(alive)
        assert seen == len(row)


DRAWN_CUTS = st.lists(st.integers(0, 14), max_size=5)


@every_case
@given(size=st.builds(Size, SEEDS, st.integers(0, 2), st.integers(0, 14), st.sampled_from(HEADS)), drawn=DRAWN_CUTS)
@example(size=Size(0, 2, 14, (4, 2)), drawn=list(range(14)))  # one token at a time
@example(size=Size(1, 1, 14, (2, 1)), drawn=[9, *range(9, 14)])  # prefill, then decode
@example(size=Size(2, 2, 9, (2, 1)), drawn=[0, 0, 4, 4, 9])
@example(size=Size(3, 2, 0, (2, 1)), drawn=[0])
@torch.no_grad()
def test_any_split_is_one_pass(case, size, drawn):
    layer, x = build(case, size), inputs(size)
    state, steps = layer.init_state(size.batch), []
    borders = cuts(size.tokens, drawn)
    for begin, end in itertools.pairwise(borders):
        y, state, stats = layer(x[:, begin:end], state=state)
        steps.append((y, stats.score, stats.evict_at, state.position, content(state)))
    check_stream(layer, list(x), steps)


@every_case
@given(
    seed=SEEDS,
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    drawn=st.lists(st.tuples(*[st.integers(0, 14)] * 3), max_size=4),
)
@example(seed=0, heads=(2, 1), lengths=[14, 0, 7], drawn=[(0, 0, 0), (3, 0, 0), (3, 0, 7), (9, 0, 7)])
@example(seed=1, heads=(4, 2), lengths=[9, 9], drawn=[(t, 9 - t, 0) for t in range(10)])
@torch.no_grad()
def test_ragged_packed_pieces_are_one_pass(case, seed, heads, lengths, drawn):
    layer = build(case, Size(seed, 1, 0, heads))
    rows = rows_of(seed, lengths, 4 * heads[0])
    borders = [cuts(length, [cut[n] for cut in drawn]) for n, length in enumerate(lengths)]
    state, steps = layer.init_state(len(rows)), []
    for i in range(len(drawn) + 1):
        piece, cu_seqlens = pack([row[own[i] : own[i + 1]] for row, own in zip(rows, borders, strict=True)])
        y, state, stats = layer(piece, state=state, cu_seqlens=cu_seqlens)
        split = [x[0].tensor_split(cu_seqlens[1:-1].long().cpu()) for x in (y, stats.score, stats.evict_at)]
        steps.append((*split, state.position, content(state)))
    check_stream(layer, rows, steps)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@over_sizes(share=5)
def test_low_precision_is_finite(case, dtype, size):
    layer, x = build(case, size, dtype), inputs(size, dtype).requires_grad_()
    y, _, stats = layer(x)
    assert y.dtype == dtype
    assert stats.score.dtype == torch.float32
    assert y.isfinite().all()
    assert stats.score.isfinite().all()
    for grad in torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True):
        assert grad is None or grad.isfinite().all()
    with torch.no_grad():
        state = layer.init_state(size.batch)
        for t in range(size.tokens):
            step = layer(x[:, t : t + 1], state=state)
            state = step.state
            assert step.y.isfinite().all()
            assert step.y.dtype == dtype
            assert state.memory.recurrent.dtype == torch.float32


@pytest.mark.parametrize("case", ["threshold", "delta-relative-topk", "router-and"])
@over_sizes(share=2)
@torch.no_grad()
def test_float32_is_near_float64(case, size):
    # a score within rounding of tau may fall on either side: the decisions of float64 are replayed
    layer, x = build(case, size), inputs(size)
    exact = layer(x)
    layer.float().selector.forward = lambda *_, **__: hb.Selection(exact.stats.evict_at)
    close(layer(x.float()).y.double(), exact.y, 2e-4)


@every_case
@over_sizes(share=5)
@torch.no_grad()
def test_strides_do_not_matter(case, size):
    layer, x = build(case, size), inputs(size)
    wide = torch.zeros(x.shape[1], 2 * x.shape[2], x.shape[0], dtype=x.dtype).permute(2, 0, 1)
    strided = wide[..., ::2]
    strided.copy_(x)
    assert not size.tokens or not strided.is_contiguous() or x.numel() == 1
    plain_result, result = layer(x), layer(strided)
    close(result.y, plain_result.y)
    assert torch.equal(result.stats.evict_at, plain_result.stats.evict_at)


@every_case
@over_sizes(share=5)
def test_same_call_same_bits_and_nothing_given_changes(case, size):
    layer, x = build(case, size), inputs(size)
    half = size.tokens // 2
    first = layer(x[:, :half], state=layer.init_state(size.batch))
    given_tensors = [x, *tensors(first.state[:3]), *layer.state_dict().values()]
    given_tensors = [tensor for tensor in given_tensors if isinstance(tensor, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in given_tensors]
    versions = [tensor._version for tensor in given_tensors]
    results = [layer(x[:, half:], state=first.state.fork()) for _ in range(2)]
    assert same(*(result._replace(state=result.state.state_dict()) for result in results))
    assert same(layer(x), layer(x))
    # NaN equals itself here: a controller's sample starts so
    assert all(
        torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)) for old, new in zip(before, given_tensors, strict=True)
    )
    assert versions == [tensor._version for tensor in given_tensors]


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
            assert not any(stored.requires_grad for stored in state.cache.read() if stored is not None)
            pieces.append(y)
        return torch.cat(pieces, 1)

    selector, layer.selector = layer.selector, hb.Threshold(math.inf)
    for one, other in zip(gradients(in_pieces()), gradients(layer(x).y), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other)
    # keys and values of earlier pieces as constants: the gradient of one pass in which they are
    layer.selector = selector
    close(in_pieces(), layer(x).y)

    def detached(q, k, v, evict_at, *, logit_bias, **rest):
        reads = []
        for begin, end in ((0, 5), (5, 9), (9, 12)):
            past = (
                None if x is None else torch.cat([x[:, :begin].detach(), x[:, begin:]], 1) for x in (k, v, logit_bias)
            )
            k_, v_, bias = past
            reads.append(attend(q, k_, v_, evict_at, logit_bias=bias, **rest).out[:, begin:end])
        return AttentionOutput(torch.cat(reads, 1), None)

    pieces = gradients(in_pieces())
    attend = hamblocks.attention.selected_attention
    monkeypatch.setattr(hamblocks.attention, "selected_attention", detached)
    whole = gradients(layer(x).y)
    for one, other in zip(pieces, whole, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_cases_neither_keep_all_nor_drop_all(case):
    # otherwise the laws above would hold for a layer that decides nothing
    layer, x = build(case, Size(0, 2, 14, (4, 2))), inputs(Size(0, 2, 14, (4, 2)))
    evict_at = layer(x).stats.evict_at
    position = torch.arange(14)[None, :, None]
    stored = (position < 13) & (evict_at > position)
    assert stored.any()
    assert not (stored & (evict_at == NEVER))[position.expand_as(stored) < 13].all()
