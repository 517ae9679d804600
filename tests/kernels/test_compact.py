"""Lists by a fused scan: more blocks than one, heads in groups, and nothing read back from the
device."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hamblocks.testing import EvictAt, evict_at
from hamblocks.testing.inputs.ops import compact_by_definition
from hamblocks_ops import compact, explain
from hamblocks_ops.dispatch import WHEN_NAMED

triton = import_module("hamblocks_ops.compact.triton")


@pytest.mark.slow
@given(case=evict_at(tokens=st.integers(0, 30), heads=st.integers(1, 20)), spare=st.integers(0, 20))
def test_any_number_of_blocks_gives_the_definition(case: EvictAt, spare: int) -> None:
    call = case.tensors()
    expected = compact_by_definition(**call)
    length = expected.index.shape[2]
    with patch.object(triton, "TOKENS", 8):
        found = compact(**call, capacity=length + spare, impl="triton")
    assert torch.equal(found.lengths, expected.lengths)
    for x, other, fill in zip(found[:3], expected[:3], (case.rows[1], 2**31 - 1, 0), strict=True):
        assert torch.equal(x[..., :length], other)
        assert bool((x[..., length:] == fill).all())


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_where_values_are_not_checked() -> None:
    call = EvictAt(tokens=20, policy="all").tensors()
    with patch.object(
        import_module("hamblocks_ops.compact"), "values_are_checked", lambda _: False
    ):
        both = [compact(**call, capacity=7, impl=impl) for impl in ("triton", "scatter")]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_operator_is_registered_well() -> None:
    lifetimes = EvictAt(tokens=9).tensors()["evict_at"]
    position = torch.arange(9)[None, :, None].expand_as(lifetimes)
    torch.library.opcheck(
        triton.lists, (lifetimes, position, 5), test_utils=("test_schema", "test_faketensor")
    )


def test_reasons() -> None:
    answers = explain(compact, torch.ones(1, 2, 1, dtype=torch.int32), capacity=1)
    assert answers["scatter"] == "yes"
    if not torch.cuda.is_available():
        assert answers["triton"] == WHEN_NAMED + "Triton's interpreter is for tests"
