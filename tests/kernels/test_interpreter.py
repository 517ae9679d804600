"""The mended interpreter computes what a GPU does: bfloat16 above all."""

from __future__ import annotations

from importlib import import_module
from unittest.mock import patch

import pytest
import torch

from hamblocks.testing.interpreter import mend
from hamblocks_ops.dispatch import interpreting

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)


def test_bfloat16_is_computed_as_torch_does() -> None:
    arithmetic = import_module("interpreted_kernels").arithmetic
    x, y = (
        torch.randn(64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1)
    )
    x[:3] = torch.tensor([float("inf"), float("nan"), 0.0])
    found, scalars = torch.empty(6, 64, dtype=torch.bfloat16), torch.empty(4, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, found, scalars, 64)
    wide = x.float() * 1.001
    exponential = (x.float() * 0.6931471805599453).exp()
    expected = [
        x * y,
        x + y,
        x / y,
        torch.maximum(x.nan_to_num(nan=0), y),
        wide.bfloat16(),
        exponential.bfloat16(),
    ]
    for name, got, want in zip(
        ("*", "+", "/", "max", "cast", "exp2"), found, expected, strict=True
    ):
        if name == "max":
            got, want = got[2:], want[2:]
        assert torch.allclose(
            got.float(), want.float(), rtol=2**-8 if name == "exp2" else 0, atol=0, equal_nan=True
        ), name
    assert scalars[0] == y.float().sum().bfloat16()
    assert scalars[1] == y.max()
    assert torch.equal(scalars[2:], (y[:2] * torch.tensor([0.0, 1.0])).bfloat16())


def test_products_of_bfloat16() -> None:
    product = import_module("interpreted_kernels").product
    x, y = (
        torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in (0, 1)
    )
    found = torch.empty(16, 16)
    product[(1,)](x, y, found, 16)
    assert torch.allclose(found, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_a_triton_that_compiles_is_not_mended() -> None:
    assert interpreting()
    mend()  # a second time changes nothing
    with (
        patch("hamblocks.testing.interpreter.interpreting", lambda: False),
        pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"),
    ):
        mend()
