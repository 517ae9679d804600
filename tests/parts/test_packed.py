"""per_sequence: packed equals one by one, pieces equal one pass, and `run` always has a token."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import SEEDS, close, rows_of, same

import hamblocks as hb

LENGTHS = st.lists(st.integers(0, 5), max_size=5)
EMPTY = [[], [0], [0, 0, 0]]


class Sums(NamedTuple):
    total: torch.Tensor
    count: torch.Tensor


def running_sum(x, weight, state):
    """A function of whole sequences: running sums of x, weighted; nothing about packing."""
    assert x.shape[0] >= 1
    assert x.shape[1] >= 1
    state = Sums(torch.zeros_like(x[:, 0]), weight.new_zeros(len(x))) if state is None else state
    total = state.total[:, None] + (x * weight[..., None]).cumsum(1)
    outputs = {"total": total, "parts": (total.square(), None), "weight": weight + 1}
    return outputs, Sums(total[:, -1], state.count + weight.shape[1])


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(seed, lengths):
    """Packed tensors and their borders; one floating tensor and one of integers."""
    x = torch.cat([torch.zeros(0, 3).double(), *rows_of(seed, lengths, 3)])[None]
    weight = torch.arange(x.shape[1])[None] % 3
    return (x, weight), packed(lengths)


def one_by_one(lengths, tensors, states):
    """What `running_sum` gives each sequence alone; an empty one keeps its state."""
    outputs, after = [], []
    for (begin, end), state in zip(pairwise(packed(lengths).tolist()), states, strict=True):
        if begin < end:
            out, state = running_sum(*(x[:, begin:end] for x in tensors), state)
            outputs.append(out)
        after.append(state)
    return outputs, after


def joined(outputs):
    return {
        "total": torch.cat([out["total"] for out in outputs], 1),
        "parts": (torch.cat([out["parts"][0] for out in outputs], 1), None),
        "weight": torch.cat([out["weight"] for out in outputs], 1),
    }


@given(seed=SEEDS, lengths=LENGTHS, later=st.data())
def test_packed_is_one_by_one_over_two_calls(seed, lengths, later):
    states = [None] * len(lengths)
    state = None
    for call in range(2):
        now = lengths if call == 0 else [later.draw(st.integers(0, 4)) for _ in lengths]
        tensors, borders = draw(seed + call, now)
        got, state = hb.per_sequence(running_sum, *tensors, cu_seqlens=borders, state=state)
        outputs, states = one_by_one(now, tensors, states)
        assert isinstance(state, Sums)
        if outputs:
            assert got["parts"][1] is None
            assert same(got, joined(outputs))
        assert got["total"].shape == (1, sum(now), 3)
        for n, own in enumerate(states):
            one = Sums(*(x[n : n + 1] for x in state))
            fresh = Sums(torch.zeros(1, 3).double(), torch.zeros(1).long())
            assert same(one, fresh if own is None else own)
        assert state.total.shape == (len(lengths), 3)


@pytest.mark.parametrize("lengths", EMPTY)
@pytest.mark.parametrize("fresh", [True, False])
def test_without_a_token_outputs_are_empty_and_states_stay(lengths, fresh):
    tensors, borders = draw(0, lengths)
    before = None if fresh else Sums(torch.rand(len(lengths), 3).double(), torch.ones(len(lengths)))
    got, after = hb.per_sequence(running_sum, *tensors, cu_seqlens=borders, state=before)
    assert got["total"].shape == got["parts"][0].shape == (1, 0, 3)
    assert got["weight"].shape == (1, 0)
    assert [got["total"].dtype, got["weight"].dtype] == [torch.float64, torch.int64]
    assert isinstance(after, Sums)
    if fresh:
        assert after.total.shape == (len(lengths), 3)
        assert after.total.dtype == torch.float64
        assert not after.total.any()
        assert not after.count.any()
    else:
        assert same(before, after)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_a_batch_without_a_token(shape):
    x, weight = torch.rand(*shape, 3), torch.ones(shape, dtype=torch.int64)
    got, after = hb.per_sequence(running_sum, x, weight)
    assert got["total"].shape == (*shape, 3)
    assert got["weight"].shape == shape
    assert after.total.shape == (shape[0], 3)
    assert not after.total.any()


@given(seed=SEEDS, batch=st.integers(1, 3), tokens=st.integers(1, 6))
def test_a_batch_is_one_call(seed, batch, tokens):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, generator=generator)
    weight = torch.arange(batch * tokens).view(batch, tokens)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return running_sum(*arguments)

    got, after = hb.per_sequence(counted, x, weight)
    assert len(calls) == 1
    assert same((got, after), running_sum(x, weight, None))
    assert same(hb.per_sequence(counted, x, weight, state=after), running_sum(x, weight, after))


@given(seed=SEEDS, lengths=LENGTHS)
@example(seed=0, lengths=[0, 2, 0, 1])
def test_gradients_are_those_of_one_by_one(seed, lengths):
    (x, weight), borders = draw(seed, lengths)
    state = Sums(torch.rand(len(lengths), 3).double(), torch.zeros(len(lengths)))
    given_x, total = x.clone().requires_grad_(), state.total.clone().requires_grad_()
    got, after = hb.per_sequence(
        running_sum, given_x, weight, cu_seqlens=borders, state=state._replace(total=total)
    )
    # the state of every sequence counts; the outputs only where there is a token
    loss = after.total.square().sum() + got["total"].square().sum()
    gradients = torch.autograd.grad(loss, [given_x, total], allow_unused=True)
    outputs, states = one_by_one(
        lengths,
        (given_x, weight),
        [Sums(total[n : n + 1], state.count[n : n + 1]) for n in range(len(lengths))],
    )
    loss = sum((own.total.square().sum() for own in states), total.sum() * 0)
    loss = loss + sum(out["total"].square().sum() for out in outputs)
    expected = torch.autograd.grad(loss, [given_x, total], allow_unused=True)
    for got_one, expected_one in zip(gradients, expected, strict=True):
        assert (got_one is None) == (expected_one is None)
        if got_one is not None:
            close(got_one, expected_one)


def test_a_function_without_a_state():
    borders = packed([2, 0, 1])
    got, state = hb.per_sequence(lambda x, state: (x + 1, ()), torch.ones(1, 3), cu_seqlens=borders)
    assert got.tolist() == [[2, 2, 2]]
    assert state == ()


X, WEIGHT = torch.rand(1, 3, 2), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tensors", lambda: hb.per_sequence(running_sum)),
        ("tensors", lambda: hb.per_sequence(running_sum, X, WEIGHT[:, :2])),
        ("tensors", lambda: hb.per_sequence(running_sum, X, WEIGHT[0])),
        ("tensors", lambda: hb.per_sequence(running_sum, X, 3)),
        ("cu_seqlens", lambda: hb.per_sequence(running_sum, X, WEIGHT, cu_seqlens=packed([2]))),
        (
            "state",
            lambda: hb.per_sequence(running_sum, X, WEIGHT, state=Sums(X[:, 0].expand(2, 2), X)),
        ),
        (
            "state",
            lambda: hb.per_sequence(
                running_sum, X, WEIGHT, cu_seqlens=packed([1, 2]), state=Sums(X[:, 0], X[:, 0])
            ),
        ),
        ("run", lambda: hb.per_sequence(lambda x, state: x, X)),
        ("run", lambda: hb.per_sequence(lambda x, state: (x[:, 1:], state), X)),
        ("run", lambda: hb.per_sequence(lambda x, state: (x, x.flatten(0, 1)), X)),
        ("run", lambda: hb.per_sequence(lambda x, state: (x, x.sum()), X, cu_seqlens=packed([3]))),
    ],
)
def test_a_bad_argument_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*"):
        call()
