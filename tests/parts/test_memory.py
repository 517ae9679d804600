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
