"""Softmax attention over a cache in pages, for decoding: few queries, sequences of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_floating,
    check_integer,
    check_range,
    check_scale,
    check_tensor,
    values_are_checked,
    without_heads,
    wrong,
)
from hamblocks_ops.declare import Hints, op_with_choice
from hamblocks_ops.dispatch import Implementation, interpreted
from hamblocks_ops.packing import NEVER, no_padding
from hamblocks_ops.paged_attention import pages, reference
from hamblocks_ops.paged_attention.layout import (
    PagedCall,
    PagedRows,
    PageMemo,
    Pages,
    check_slabs,
    check_table,
    total,
    unpage,
    users,
)
from hamblocks_ops.selected_attention.call import AttentionOutput, rounded, without_tiles

__all__ = ["PageMemo", "PagedRows", "Pages", "paged_attention", "unpage"]


def _refused_by_triton(call: PagedCall) -> str | None:
    return without_tiles(call.q)


def _run_triton(call: PagedCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.paged_attention.triton import run

    return run(call)


def _example(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if x.requires_grad:
        return None
    page = x.new_zeros(1, 16, 1, x.shape[3])
    position = torch.zeros(1, 16, dtype=torch.int32, device=x.device)
    table = torch.zeros(1, x.shape[2], 1, dtype=torch.int32, device=x.device)
    pages = Pages(page, page, position, position, None)
    return (x, [pages], table), {"query_position": position[:, : x.shape[1]]}


@op_with_choice(
    Implementation("triton", _run_triton, _refused_by_triton, passed_over=interpreted, opaque=True),
    Implementation("pages", pages.run),
    Implementation("reference", reference.run),
    finish=lambda call, result: rounded(call.q, result),
    hints=Hints(
        causal="its keys come from a cache, whose positions do not follow the queries",
        packs="it takes no packed sequences",
        traced="it plans on the host which pages it reads",
        attends=True,
    ),
    example=_example,
)
def paged_attention(
    q: Tensor,
    slabs: Sequence[Pages],
    block_table: Tensor,
    *,
    query_position: Tensor,
    scale: float | None = None,
    shared: bool | None = None,
    memo: PageMemo | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    r"""Attends from every query to the tokens in its stream's pages that are stored at its time.

    \[
    o_t = \sum_{j:\; p_j \le t < \text{evict\_at}_j} \operatorname{softmax}_j
          (\text{scale} \cdot q_t^\top k_j + \text{logit\_bias}_j)\, v_j
    \]

    A stream is one sequence with the W key/value heads that a page holds: Hkv = H * W, key/value
    head h * W + w. With W = 1 every head stores tokens of its own; with H = 1 all heads store the
    same tokens. A query that sees nothing reads 0 and has lse = -inf. Slots that no query sees may
    hold anything. The op is for inference: it has no gradient.

    Args:
        q: `[N, T, Hq, D]`, any floating dtype; Hq is a multiple of Hkv (query head h reads head h
            // (Hq // Hkv)).
        slabs: the pages, counted through all slabs; they may differ in their number of pages and
            their page size.
        block_table: int32 or int64 `[N, H, M]`, the page table of every stream, -1 for no page. The
            order of pages does not matter, and several streams may list the same page.
        query_position: int `[N, T]`, within the sequence; -1 is padding, which sees nothing.
        scale: factor of the logits; None: D ** -0.5.
        shared: whether a page may be listed twice. None: it is looked up, which waits for the
            device.
        memo: keeps what a call computes from the page table, for later calls with the same table
            (see `PageMemo`). Only for tensors on a CPU: on a GPU a replayed graph may change the
            table. None: nothing is kept.
        impl: "triton" (a GPU kernel over the listed pages; bfloat16, float16, float32, head sizes
            up to 256), "pages" (reads pages where they lie, any device), "reference" (padded keys,
            dense mask), or "auto".

    Returns:
        out `[N, T, Hq, D]`, dtype of q, and lse `[N, T, Hq]` (see `AttentionOutput`).

    Raises:
        ValueError: a bad argument, or one that requires grad where grad is enabled; the message
            names it, what was expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    call = PagedCall(
        q=q,
        # without a slab every page table is empty; implementations still read sizes off the first
        # slab
        slabs=slabs or [_no_pages(q)],
        block_table=block_table,
        query_position=_without_padding(query_position).to(torch.int32),
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        shared=shared,
        memo=memo,
    )
    return paged_attention.request(call, impl)


@paged_attention.check
def _check_paged_attention(
    q: Tensor,
    slabs: Sequence[Pages],
    block_table: Tensor,
    *,
    query_position: Tensor,
    scale: float | None = None,
    shared: bool | None = None,
    memo: PageMemo | None = None,
    impl: str = "auto",
) -> None:
    check_tensor("q", q, "[N, T, Hq, D]", [None] * 4)
    check_floating("q", q)
    if 0 in q.shape[2:]:
        raise without_heads("q", q)
    if scale is not None:
        check_scale(scale)
    check_slabs(slabs, like=q)
    sequences, queries, heads, _ = q.shape
    slabs = slabs or [_no_pages(q)]
    check_table(block_table, slabs, q, sequences)
    deciding, together = block_table.shape[1], slabs[0].k.shape[2]
    if deciding * together == 0 or heads % (deciding * together) != 0:
        got = f"{deciding} of them, each for {together} heads"
        expected = f"page tables whose key/value heads divide the {heads} heads of q"
        raise wrong("block_table", expected, got)
    check_tensor("query_position", query_position, "[N, T]", [sequences, queries], like=q)
    check_integer("query_position", query_position)
    check_range("query_position", query_position, -1, NEVER)
    if shared is not None and not isinstance(shared, bool):
        raise wrong("shared", "True, False or None", shared)
    if memo is not None and not isinstance(memo, PageMemo):
        raise wrong("memo", "a PageMemo or None", memo)
    if (
        shared is False
        and values_are_checked(block_table)
        and bool((users(block_table, total(slabs))[:-1] > 1).any())
    ):
        raise wrong("shared", "True or None where a page is listed twice", shared)
    _check_no_gradient(q, slabs)


def _without_padding(position: Tensor) -> Tensor:
    return position if no_padding(position) else torch.where(position < 0, NEVER, position)


def _no_pages(q: Tensor) -> Pages:
    keys = q.new_empty(0, 1, 1, q.shape[3])
    times = torch.empty(0, 1, dtype=torch.int32, device=q.device)
    return Pages(keys, keys, times, times)


def _check_no_gradient(q: Tensor, slabs: Sequence[Pages]) -> None:
    if not torch.is_grad_enabled():
        return
    named = [("q", q)]
    for index, (k, v, _, _, bias) in enumerate(slabs):
        named += [(f"slabs[{index}].{name}", x) for name, x in zip(("k", "v"), (k, v), strict=True)]
        named += [] if bias is None else [(f"slabs[{index}].logit_bias", bias)]
    wanting = [name for name, x in named if x.requires_grad]
    if wanting:
        expected = "no gradient, of q or of slabs, in an op for inference"
        raise wrong("q", expected, f"grad required by {wanting[0]}")
