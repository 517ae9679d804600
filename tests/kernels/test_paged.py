"""Attention to pages in Triton: cut into shares, blind to what is not seen, and without waiting for
a device."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch

import hamblocks as hb
from hamblocks.testing import OpImplementation, PagedInputs
from hamblocks.testing.inputs.paged import slabs_of
from hamblocks_ops import explain, paged_attention
from hamblocks_ops.dispatch import WHEN_NAMED

triton = import_module("hamblocks_ops.paged_attention.triton")
PART = OpImplementation(paged_attention, impl="triton")
CASES = [
    PagedInputs(width=9, slabs=((20, 7), (9, 16), (3, 1)), queries=3, group=3, bias="hidden"),
    PagedInputs(
        width=6, slabs=((30, 5),), sequences=3, together=2, group=2, forked=True, queries=2
    ),
    PagedInputs(width=40, slabs=((90, 3),), sequences=1, rows=1, group=1, policy="all", dim=20),
]


def small(shares: int) -> Any:
    """Tiles of 16 slots, each share of at least one, and as many shares as that gives up to a
    number."""
    return patch.multiple(
        triton,
        MIN_SHARE_TILES=1,
        MAX_WAVES=shares,
        config=lambda _width, _dtype: triton.Config(16, 16, 4, 1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=["slabs", "forked", "long"])
def test_any_number_of_shares_gives_the_same(case: PagedInputs, dtype: torch.dtype) -> None:
    problem = PART.problem(replace(case, dtype=dtype))
    exact = problem.run("reference", dtype=torch.float64)
    own = problem.run("reference")
    for shares in (1, 100):
        with small(shares):
            got = problem.run("it")
        for name, x in exact.items():
            error, allowed = (float((y[name].double() - x).nan_to_num().norm()) for y in (got, own))
            size = float(x.nan_to_num(neginf=0).norm())
            assert error <= 2 * allowed + 2 * torch.finfo(got[name].dtype).eps * size, (
                f"{name}, {shares} shares"
            )


def test_shares_follow_the_shapes_alone() -> None:
    cpu = torch.device("cpu")
    assert triton._shares(64, 64, 1, cpu) == (1, 1)
    assert triton._shares(64 * 64, 64, 1, cpu) == (16, 4)
    assert triton._shares(64 * 640, 64, 1, cpu) == (16, 40)
    assert triton._shares(64 * 640, 64, 4, cpu) == (4, 160)
    assert triton._shares(64 * 640, 64, 1000, cpu) == (1, 640)
    for slots in range(1, 3000, 97):
        number, per_share = triton._shares(slots, 64, 1, cpu)
        assert (number - 1) * per_share * 64 < slots <= number * per_share * 64


def call(case: PagedInputs) -> dict[str, Any]:
    tensors = case.tensors()
    given = {name: tensors.pop(name) for name in ("q", "block_table", "query_position")}
    return given | {"slabs": slabs_of(tensors)}


@pytest.mark.slow
def test_operator_is_registered_well() -> None:
    given = call(PagedInputs(queries=2, group=2, bias="some", dtype=torch.float32))
    k, v, position, evict_at, bias = (list(x) for x in zip(*given["slabs"], strict=True))
    asked = given["query_position"].to(torch.int32)
    args = given["q"], k, v, position, evict_at, bias, given["block_table"], asked, 0.5
    torch.library.opcheck(triton.attend, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_traces_whole() -> None:
    given = call(PagedInputs(queries=2, dtype=torch.float32))

    def run() -> Any:
        with torch.no_grad():
            return paged_attention(**given, impl="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(), run(), strict=True):
        assert torch.equal(got, expected)


def test_reasons() -> None:
    def reason(**case: Any) -> str:
        with torch.no_grad():
            return explain(paged_attention, **call(PagedInputs(**case)))["triton"]

    assert reason() == "it computes in float32 at the most"
    assert reason(dim=257, dtype=torch.bfloat16) == "a tile holds head sizes up to 256, not 257"
    if not torch.cuda.is_available():
        assert reason(dtype=torch.bfloat16) == WHEN_NAMED + "Triton's interpreter is for tests"


@pytest.mark.slow
@torch.no_grad()
def test_a_layer_that_names_it_decodes_from_pages_without_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = hb.HAMLayer(
        32, 2, selector=hb.Window(4), attention=hb.SelectedAttention(impl="triton")
    ).eval()
    state = layer.prefill(torch.randn(2, 6, 32)).state

    def copies(*_args: Any) -> Any:
        raise AssertionError("a padded copy of the pages")

    monkeypatch.setattr("hamblocks.cache.extension.unpage", copies)
    runs: list[Any] = []
    run = triton.run
    monkeypatch.setattr(triton, "run", lambda call: (runs.append(call), run(call))[1])
    layer.decode(torch.randn(2, 32), state)
    assert len(runs) == 1
