"""Formulas in blocks on a CPU: results and gradients are those of the plain ops, wherever blocks end."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from parts_cases import SEEDS, close

from hamblocks import blocked
from hamblocks.blocked.convolution import convolve, convolve_at_once
from hamblocks.blocked.norm import Length, normalize, normalize_at_once

BLOCKS = st.integers(1, 60)
"""Numbers of a block, so that blocks end within rows, at their end, and behind several rows."""


def drawn(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]


def equal(found, expected, given, seed):
    """Both results, their gradients, and the gradients of these."""
    close(found, expected)
    [grad] = drawn(seed + 1, found.shape)
    pairs = [
        torch.autograd.grad(y, given, grad, create_graph=True, allow_unused=True)
        for y in (found, expected)
    ]
    for one, other in zip(*pairs, strict=True):
        close(one, other)
    once = [torch.autograd.grad(y, given, grad, retain_graph=True) for y in (found, expected)]
    for one, other in zip(*once, strict=True):
        close(one, other)
    second = [
        torch.autograd.grad(sum((one**2).sum() for one in grads), [*given, grad]) for grads in pairs
    ]
    for one, other in zip(*second, strict=True):
        close(one, other)


@given(
    seed=SEEDS,
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)),
    taps=st.integers(2, 4),
    activates=st.booleans(),
    block=BLOCKS,
)
@example(seed=0, sizes=(2, 1, 3), taps=4, activates=True, block=1)
def test_the_convolution_is_that_of_plain_ops(seed, sizes, taps, activates, block):
    rows, _, channels = sizes
    given = drawn(seed, sizes, (rows, taps - 1, channels), (channels, taps))
    with mock.patch.object(blocked, "BLOCK", block):
        found = convolve(*given, activates)
        equal(found, convolve_at_once(*given, activates), given, seed)


@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    length=st.sampled_from([Length(0.25, 1e-3, 0), Length(1, 1e-3, 0), Length(1, 0, 1e-12)]),
    weighted=st.booleans(),
    block=BLOCKS,
)
def test_norms_are_those_of_plain_ops(seed, sizes, length, weighted, block):
    x, weight = drawn(seed, sizes, sizes[-1:])
    given = [x, weight] if weighted else [x]
    with mock.patch.object(blocked, "BLOCK", block):
        found = normalize(x, weight if weighted else None, length)
        equal(found, normalize_at_once(*given, length=length), given, seed)


def test_float32_loses_a_few_roundings():
    """Also in sums over tokens: gradients of weights."""
    x, past, taps, weight = (
        one.detach().float().requires_grad_()
        for one in drawn(0, (2, 700, 40), (2, 3, 40), (40, 4), (40,))
    )
    calls = [
        (convolve, convolve_at_once, (x, past, taps), {"activates": True}),
        (normalize, normalize_at_once, (x, weight), {"length": Length(1 / 40, 1e-6, 0)}),
    ]
    for run, exact, inputs, more in calls:
        wide = [one.detach().double().requires_grad_() for one in inputs]
        found, expected = run(*inputs, **more), exact(*wide, **more)
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        pairs = zip(
            [found, *torch.autograd.grad(found, inputs, grad)],
            [expected, *torch.autograd.grad(expected, wide, grad.double())],
            strict=True,
        )
        for one, other in pairs:
            error = (one.double() - other).norm() / other.norm()
            assert error < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("expected", "dtype", "other"),
    [
        (True, torch.float32, torch.float32),
        (True, torch.float64, torch.float64),
        (False, torch.bfloat16, torch.bfloat16),
        (False, torch.float32, torch.float64),
    ],
)
def test_wide_dtypes_are_taken_in_blocks(expected, dtype, other):
    x, weight = torch.zeros(1, 2, 3, dtype=dtype), torch.zeros(3, dtype=other)
    assert blocked.runs(x, weight) == expected
    assert not torch.func.vmap(lambda x: torch.tensor(blocked.runs(x[None])))(x).any()
