"""Delta memories: zeros are a fresh state, wrong states are refused, the convolution by hand."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import SEEDS, close, pack, rows_of, same
from torch.nn import functional as F

import hamblocks as hb

DIMS = hb.LayerDims(12, 4, 2, 3)
MEMORIES = [hb.DeltaMemory, hb.GatedDeltaMemory]


def built(memory, **options):
    torch.manual_seed(0)
    memory = memory(**options)
    memory.build(DIMS)
    return memory.double()


def call(memory, x, state=None, cu_seqlens=None):
    q, k, v = (x @ torch.ones(12, n * 3).double().triu() for n in (4, 2, 2))
    q, k, v = (y.unflatten(-1, (-1, 3)) for y in (q, k, v))
    position = torch.zeros(x.shape[:2], dtype=torch.int32)
    return memory(x, q, k, v, position=position, state=state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("memory", MEMORIES)
@given(seed=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3))
@example(seed=0, lengths=[0, 6, 1])
def test_a_state_of_zeros_is_a_fresh_one(memory, seed, lengths):
    memory = built(memory)
    x, borders = pack(rows_of(seed, lengths, 12))
    fresh = call(memory, x, cu_seqlens=borders)
    zeros = hb.DeltaMemoryState(*(torch.zeros_like(y) for y in fresh[2]))
    assert same(call(memory, x, zeros, borders), fresh)
    assert same(call(memory, x[:, :0])[2], [y[:1] for y in zeros])


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_saved_state_is_rebuilt_by_its_type(memory):
    memory, x = built(memory), rows_of(0, [5], 12)[0][None]
    assert memory.state_type is hb.DeltaMemoryState
    state = call(memory, x[:, :3])[2]
    rebuilt = memory.state_type(*tuple(state))
    assert same(call(memory, x[:, 3:], rebuilt), call(memory, x[:, 3:], state))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state", lambda state: state.conv),
        ("state", tuple),
        ("state", lambda state: {"conv": state.conv, "recurrent": state.recurrent}),
        ("state.conv", lambda state: state._replace(conv=state.conv[:, 1:])),
        ("state.conv", lambda state: state._replace(conv=state.conv[..., 1:])),
        ("state.conv", lambda state: state._replace(conv=state.conv[:1])),
        ("state.conv", lambda state: state._replace(conv=None)),
        ("state.conv", lambda state: state._replace(conv=state.conv.to("meta"))),
        ("state.recurrent", lambda state: state._replace(recurrent=state.recurrent[:1])),
        ("state.recurrent", lambda state: state._replace(recurrent=state.recurrent[..., 1:])),
        ("state.recurrent", lambda state: state._replace(recurrent=0.0)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_state_is_refused(name, change, packed):
    memory = built(hb.GatedDeltaMemory)
    x, borders = pack(rows_of(0, [3, 2], 12)) if packed else (torch.rand(2, 3, 12).double(), None)
    state = call(memory, x, cu_seqlens=borders)[2]
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*"):
        call(memory, x, change(state), borders)


@given(
    seed=SEEDS,
    size=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    cut=st.integers(0, 7),
)
@example(seed=0, size=4, lengths=[0, 7, 2], cut=1)
@example(seed=0, size=1, lengths=[3], cut=1)
def test_short_convolution_is_torch_conv1d(seed, size, lengths, cut):
    torch.manual_seed(seed)
    conv = hb.ShortConvolution(6, size).double()
    assert (conv.hidden_size, conv.kernel_size) == (6, size)
    rows = rows_of(seed, lengths, 6)
    # conv1d refuses an empty row, hence one zero behind it, whose output is dropped
    padded = [F.pad(row.T, [size - 1, 1]) for row in rows]
    expected = [F.silu(F.conv1d(row, conv.weight[:, None], groups=6)).T[:-1] for row in padded]
    state, pieces = None, []
    for part in ([row[:cut] for row in rows], [row[cut:] for row in rows]):
        x, borders = pack(part)
        y, state = conv(x, state, borders)
        pieces.append(y[0].split([len(row) for row in part]))
    for n, row in enumerate(rows):
        close(torch.cat([piece[n] for piece in pieces]), expected[n])
        y, alone = conv(row[None])
        close(y[0], expected[n])
        assert same(alone, state[n : n + 1])


@pytest.mark.parametrize(
    ("name", "sizes"), [("hidden_size", (0, 4)), ("kernel_size", (4, 0)), ("kernel_size", (4, 2.0))]
)
def test_sizes_of_the_convolution_are_checked(name, sizes):
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer >= 1, got "):
        hb.ShortConvolution(*sizes)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 4), (6, 2), (2, 2)])
def test_scores_of_a_memory_with_its_own_heads_reach_every_key_value_head(heads, kv_heads):
    memory = hb.GatedDeltaMemory(projections="own", num_heads=heads, head_dim=2)
    layer = hb.HAMLayer(8, 4, num_kv_heads=kv_heads, memory=memory, selector=hb.TopK(2)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    metric = layer.gate.metric
    _, trace, _ = memory(x, None, None, None, position=torch.arange(5)[None], metric=metric)
    score = layer(x).stats.score
    assert score.shape == (1, 5, kv_heads)
    for head in range(kv_heads):
        own = range(head * heads // kv_heads, max((head + 1) * heads // kv_heads, 1))
        own = own if heads >= kv_heads else [head * heads // kv_heads]
        torch.testing.assert_close(score[..., head], trace.score[..., list(own)].mean(-1))


def test_scores_that_fit_no_key_value_heads_are_refused():
    memory = hb.GatedDeltaMemory(projections="own", num_heads=3)
    layer = hb.HAMLayer(8, 2, memory=memory, selector=hb.TopK(2))
    with pytest.raises(
        ValueError, match=r"^score: expected one of 1, 2 heads from the gate, got 3"
    ):
        layer(torch.randn(1, 5, 8))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"projections": "mine"}, "projections"),
        ({"num_heads": 3}, "projections"),
        ({"projections": "own", "num_heads": 0}, "num_heads"),
        ({"projections": "own", "expand_v": 0}, "expand_v"),
        ({"projections": "own", "expand_v": 0.3}, "expand_v"),
        ({"num_k_heads": 1}, "projections"),
        ({"projections": "own", "num_k_heads": 0}, "num_k_heads"),
        ({"projections": "own", "num_heads": 4, "num_k_heads": 3}, "num_k_heads"),
        ({"qk_l2norm_eps": -1.0}, "qk_l2norm_eps"),
        ({"qk_l2norm_eps": float("nan")}, "qk_l2norm_eps"),
        ({"conv_init": "zero"}, "conv_init"),
        ({"conv_activation": "relu"}, "conv_activation"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises(ValueError, match=rf"^{named}: expected .*, got "):
        hb.HAMLayer(8, 2, memory=hb.GatedDeltaMemory(**arguments), selector=hb.TopK(2))


def test_the_first_decay_lies_in_its_range():
    memory = hb.GatedDeltaMemory(A_init_range=(2.0, 3.0), dt_min=0.01, dt_max=0.02)
    hb.HAMLayer(64, 32, memory=memory, selector=hb.TopK(2))
    rate, step = memory.A_log.exp(), torch.nn.functional.softplus(memory.dt_bias)
    assert (rate >= 2).all()
    assert (rate <= 3).all()
    assert (step >= 0.01 - 1e-6).all()
    assert (step <= 0.02 + 1e-6).all()


def alone(memory, seed=0):
    """A memory of its own projections in a layer without attention, in float64."""
    torch.manual_seed(seed)
    return hb.HAMLayer(8, 2, memory=memory, attention=None).double().memory


def test_a_head_of_keys_serves_consecutive_heads():
    sizes = {"projections": "own", "num_heads": 6, "head_dim": 2, "expand_v": 1.5}
    few = alone(hb.GatedDeltaMemory(2, num_k_heads=2, **sizes))
    all_heads = alone(hb.GatedDeltaMemory(2, **sizes))
    weights = few.state_dict()

    def repeated(weight):
        return weight.unflatten(0, (2, 2)).repeat_interleave(3, 0).flatten(0, 1)

    conv = weights["conv.weight"].split([4, 4, 18])
    all_heads.load_state_dict(
        weights
        | {f"{name}.weight": repeated(weights[f"{name}.weight"]) for name in ("q_proj", "k_proj")}
        | {"conv.weight": torch.cat([repeated(conv[0]), repeated(conv[1]), conv[2]])}
    )
    x, position = torch.randn(2, 7, 8, dtype=torch.float64), torch.arange(7)[None]
    got, expected = (memory(x, None, None, None, position=position) for memory in (few, all_heads))
    for one, other in zip(
        (got[0], *got[1][:4], got[2].recurrent),
        (expected[0], *expected[1][:4], expected[2].recurrent),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert got[2].conv.shape == (2, 1, 26)


def test_keys_are_shorter_with_an_epsilon():
    memory = alone(hb.GatedDeltaMemory(1, projections="own", qk_l2norm_eps=0.5))
    x, position = torch.randn(2, 7, 8, dtype=torch.float64), torch.arange(7)[None]
    _, trace, _ = memory(x, None, None, None, position=position)
    for name, unit in (("q", trace.q), ("k", trace.k)):
        projected = getattr(memory, f"{name}_proj")(x)
        weight = memory.conv.weight[{"q": slice(0, 8), "k": slice(8, 16)}[name], 0]
        y = torch.nn.functional.silu(projected * weight).unflatten(-1, (2, 4))
        expected = y / (y.square().sum(-1, keepdim=True) + 0.5).sqrt()
        torch.testing.assert_close(unit, expected, rtol=1e-12, atol=1e-12)


def test_an_expansion_that_is_off_by_a_rounding_is_an_integer():
    assert 7 * (29 / 7) != 29
    memory = hb.GatedDeltaMemory(projections="own", head_dim=7, expand_v=29 / 7)
    assert alone(memory).size == (2, 29)
