"""What layers decided about one sequence, counted by plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hamblocks as hb
from hamblocks.fates import fates_of
from hamblocks.ops import NEVER


def stats_of(evict_at, begin=0, cu_seqlens=None, position=None):
    end = torch.tensor(evict_at, dtype=torch.int32)
    if position is None:
        position = begin + torch.arange(end.shape[1], dtype=torch.int32).expand(end.shape[:2])
    return hb.LayerStats(torch.rand(end.shape), end, position, cu_seqlens)


@given(
    lives=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=12
    ),
    begin=st.sampled_from([0, 5]),
)
def test_stored_tokens_are_counted_after_each_token(lives, begin):
    ends = [
        [begin + t + first, NEVER if for_good else begin + t + second]
        for t, (first, second, for_good) in enumerate(lives)
    ]
    fates = fates_of(stats_of([ends], begin))
    counted = fates.stored_after().tolist()
    for t in range(len(lives)):
        for row in range(2):
            assert counted[t][row] == sum(ends[j][row] > begin + t for j in range(t + 1))
    assert fates.stored_after()[-1].tolist() == fates.is_stored.sum(0).tolist()
    assert torch.equal(fates.is_kept[:, 1], torch.tensor([kept for *_, kept in lives]))


def test_layers_stand_side_by_side():
    torch.manual_seed(0)
    parts = [{"num_kv_heads": 2}, {"attention": None}, {"gate": hb.SharedGate(hb.KeyNorm())}]
    model = hb.Decoder(
        7,
        3,
        lambda i: hb.HAMLayer(
            8,
            4,
            **({"selector": hb.TopK(3) | hb.Window(2)} if i != 1 else {}),
            **parts[i],
        ),
    )
    stats = model(torch.randint(7, (2, 9))).stats
    fates = fates_of(stats, 1)
    assert fates.rows == [(0, 0), (0, 1), (2, 0)]
    assert torch.equal(fates.evict_at[:, :2], stats[0].evict_at[1].long())
    assert torch.equal(fates.score[:, 2:], stats[2].score[1])
    alone = fates_of(stats[0], 1)
    assert torch.equal(alone.evict_at, fates.evict_at[:, :2])


def test_a_sequence_of_a_packed_batch():
    torch.manual_seed(0)
    layer, x = hb.HAMLayer(8, 2, selector=hb.TopK(2)), torch.randn(1, 12, 8)
    stats = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 12], dtype=torch.int32)).stats
    fates = fates_of(stats, 2)
    assert fates.position.tolist() == list(range(7))
    assert torch.equal(fates.evict_at, stats.evict_at[0, 5:].long())
    assert fates_of(stats, 1).stored_after().shape == (0, 2)


def test_what_cannot_be_shown_is_an_error():
    one = stats_of([[[3], [NEVER]]])
    memory = hb.LayerStats(None, None, one.position, None)
    with pytest.raises(ValueError, match=r"^stats: expected those of a layer with attention, got"):
        fates_of([memory, None])
    with pytest.raises(ValueError, match=r"^stats: expected layers that saw the same tokens"):
        fates_of([one, stats_of([[[3], [NEVER], [3]]])])
    with pytest.raises(ValueError, match=r"^sequence: expected a number in \[0, 1\), got 1"):
        fates_of(one, 1)


def test_fractions_by_head():
    stats = stats_of([[[0, NEVER], [3, NEVER], [3, 3]], [[0, 1], [NEVER, 1], [NEVER, 3]]])
    stored = [[[0, 1], [1, 1], [1, 1]], [[0, 0], [1, 0], [1, 1]]]
    assert stats.is_stored().tolist() == torch.tensor(stored).bool().tolist()
    torch.testing.assert_close(stats.keep_fraction("head"), torch.tensor([4 / 6, 4 / 6]))
    assert stats.keep_fraction().item() == pytest.approx(8 / 12)
    empty = hb.LayerStats(
        torch.rand(1, 0, 3), torch.zeros(1, 0, 3).int(), stats.position[:1, :0], None
    )
    assert empty.keep_fraction("head").tolist() == [0, 0, 0]
    memory = hb.LayerStats(None, None, stats.position, None)
    assert memory.keep_fraction("head").tolist() == [0]
    with pytest.raises(ValueError, match=r"^stats: expected those of a layer with attention"):
        memory.is_stored()
    with pytest.raises(ValueError, match=r"^by: expected None or head, got 'layer'"):
        stats.keep_fraction("layer")
