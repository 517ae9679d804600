"""Bad arguments of paged_attention and unpage, each named with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hamblocks.testing import PagedInputs
from hamblocks.testing.inputs.paged import slabs_of
from hamblocks_ops import paged_attention, unpage

BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("q", lambda x: x.tolist(), "list"),
    ("q", lambda x: x[0], r"\[1, 4, 4\]"),
    ("q", lambda x: x.long(), "int64"),
    ("q", lambda x: x[:, :, :0], r"\[2, 1, 0, 4\]"),
    ("scale", lambda _: "half", "half"),
    ("query_position", lambda x: x[0], r"\[1\]"),
    ("query_position", lambda x: x.float(), "float32"),
    ("query_position", lambda x: x - 1000, "values from"),
    ("query_position", lambda x: x.tolist(), "list"),
    ("query_position", lambda x: x.to("meta"), "meta"),
    ("block_table", lambda x: x[0], r"\[2, 3\]"),
    ("block_table", lambda x: x[:1], r"\[1, 2, 3\]"),
    ("block_table", lambda x: x.float(), "float32"),
    ("block_table", lambda x: x.tolist(), "list"),
    ("block_table", lambda x: x.to("meta"), "meta"),
    ("block_table", lambda x: torch.full_like(x, 14), "values from 14 to 14"),
    ("block_table", lambda x: torch.full_like(x, -2), "values from -2 to -2"),
    ("block_table", lambda x: torch.cat([x, x, x], 1), "6 of them, each for 2 heads"),
    ("block_table", lambda x: x[:, :0], "0 of them"),
    ("slabs", lambda _: None, "NoneType"),
    ("slabs", lambda x: x[0], r"tuple|Pages"),
    ("slabs", lambda x: [tuple(slab) for slab in x], "list"),
    ("shared", lambda _: 1, "int 1"),
    ("shared", lambda _: "no", "no"),
]
FIELDS: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("k", lambda x: x.tolist(), "list"),
    ("k", lambda x: x[0], r"\[4, 2, 4\]"),
    ("k", lambda x: x[..., :3], r"\[5, 4, 2, 3\]"),
    ("k", lambda x: x[:, :, :1], r"\[5, 4, 1, 4\]"),
    ("k", lambda x: x.double(), "float64"),
    ("k", lambda x: x.to("meta"), "meta"),
    ("v", lambda x: x[..., :3], r"\[5, 4, 2, 3\]"),
    ("v", lambda x: x[:4], r"\[4, 4, 2, 4\]"),
    ("v", lambda x: x.half(), "float16"),
    ("v", lambda x: x.to("meta"), "meta"),
    ("position", lambda x: x[:4], r"\[4, 4\]"),
    ("position", lambda x: x.float(), "float32"),
    ("position", lambda x: x.to("meta"), "meta"),
    ("evict_at", lambda x: x[:, :3], r"\[5, 3\]"),
    ("evict_at", lambda x: x.bool(), "bool"),
    ("evict_at", lambda x: x.to("meta"), "meta"),
    ("evict_at", lambda _: None, "NoneType"),
    ("logit_bias", lambda _: None, "NoneType"),
    ("logit_bias", lambda x: x[..., None], r"\[5, 4, 1\]"),
    ("logit_bias", lambda x: x.long(), "int64"),
    ("logit_bias", lambda x: x.to("meta"), "meta"),
]
GOOD = PagedInputs(together=2, bias="some", dtype=torch.float32)


def good() -> dict[str, Any]:
    fields = GOOD.tensors()
    q, table, asks = (fields.pop(name) for name in ("q", "block_table", "query_position"))
    slabs = slabs_of(fields)
    return {"q": q, "slabs": slabs, "block_table": table, "query_position": asks}


@pytest.mark.parametrize(("name", "change", "got"), BAD)
def test_bad_arguments(name: str, change: Callable[[Any], Any], got: str) -> None:
    call = good()
    paged_attention(**call)
    call[name] = change(call.get(name))
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .*({got})"):
        paged_attention(**call)
    if (
        name in ("slabs", "block_table") and "of them" not in got and "[1, 2" not in got
    ):  # which only q rules out
        with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .*({got})"):
            unpage(call["slabs"], call["block_table"])


@pytest.mark.parametrize(("name", "change", "got"), FIELDS)
def test_bad_slabs(name: str, change: Callable[[Tensor], Any], got: str) -> None:
    call = good()
    call["slabs"][1] = call["slabs"][1]._replace(**{name: change(getattr(call["slabs"][1], name))})
    for run in (
        lambda: paged_attention(**call),
        lambda: unpage(call["slabs"], call["block_table"]),
    ):
        with pytest.raises(ValueError, match=rf"^slabs\[1\]\.{name}: expected .+, got .*{got}"):
            run()


def test_slabs_agree_with_q() -> None:
    call = good()
    for change in (lambda x: x.double(), lambda x: x[..., :3], lambda x: x.to("meta")):
        with pytest.raises(ValueError, match=r"^slabs\[0\]\.k: expected "):
            paged_attention(**(call | {"q": change(call["q"])}))
    bare = [call["slabs"][0]._replace(logit_bias=None), call["slabs"][1]]
    with pytest.raises(
        ValueError, match=r"^slabs\[1\]\.logit_bias: expected None, as in slabs\[0\], got float32"
    ):
        paged_attention(**(call | {"slabs": bare}))
    with pytest.raises(ValueError, match=r"^slabs: expected at least one slab"):
        unpage([], call["block_table"])


def test_a_page_that_is_listed_twice_is_not_private() -> None:
    call = good()
    call["block_table"][:] = -1
    call["block_table"][0, 0, 0] = call["block_table"][1, 1, 2] = 13
    with pytest.raises(
        ValueError,
        match=r"^shared: expected True or None where a page is listed twice, got bool False",
    ):
        paged_attention(**call, shared=False)
    paged_attention(**call)
