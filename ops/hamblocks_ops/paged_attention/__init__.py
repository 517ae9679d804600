"""Softmax attention over a cache in pages, for decoding: few queries, rows of unlike length, nothing gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_floating,
    check_integer,
    check_range,
    check_tensor,
    values_are_checked,
    wrong,
)
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    always,
    explain_table,
    interpreted,
    pick,
    without_triton,
)
from hamblocks_ops.packing import NEVER
from hamblocks_ops.paged_attention.layout import (
    PagedCall,
    PagedRows,
    Pages,
    check_slabs,
    check_table,
    total,
    unpage,
    users,
)
from hamblocks_ops.selected_attention import AttentionOutput

__all__ = ["PagedRows", "Pages", "explain", "paged_attention", "unpage"]


def paged_attention(
    q: Tensor,
    slabs: Sequence[Pages],
    block_table: Tensor,
    *,
    query_position: Tensor,
    scale: float | None = None,
    shared: bool | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    r"""Attends from every query to the tokens in the pages of its row that are stored at its time.

    \[
    o_t = \sum_{j:\; p_j \le t < \text{evict\_at}_j} \operatorname{softmax}_j
          (\text{scale} \cdot q_t^\top k_j + \text{logit\_bias}_j)\, v_j
    \]

    A row is one sequence with the W key/value heads that a page holds: Hkv = H * W, key/value head h * W + w. With
    W = 1 every head stores tokens of its own, with H = 1 all heads the same. A query that sees nothing reads 0 and has
    lse = -inf. What no query sees may hold anything. It is an op for inference: it has no gradient.

    Args:
        q: `[N, T, Hq, D]`, any floating dtype; Hq is a multiple of Hkv (query head h reads head h // (Hq // Hkv)).
        slabs: the pages, counted through all slabs; they may differ in their number of pages and their page size.
        block_table: int32 or int64 `[N, H, M]`, the pages of every row, -1 for none. Their order does not matter, and
            several rows may list the same page.
        query_position: int `[N, T]`, within the sequence; -1 is padding, which sees nothing.
        scale: factor of the logits; None: D ** -0.5.
        shared: whether a page may be listed twice. None: looked up, which waits for the device.
        impl: "triton" (a GPU kernel over the listed pages; bfloat16, float16, float32, head sizes up to 256),
            "pages" (reads pages where they lie, any device), "reference" (padded rows, dense mask), or "auto".

    Raises:
        ValueError: a bad argument, or one that requires grad where grad is enabled; the message names it, what was
            expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    call = _checked(q, slabs, block_table, query_position, scale, shared)
    run = pick("paged_attention", TABLE, impl, call)
    with torch.autocast(device_type=q.device.type, enabled=False):
        out, lse = run(call)
    return AttentionOutput(out.to(q.dtype), lse)


def explain(
    q: Tensor,
    slabs: Sequence[Pages],
    block_table: Tensor,
    *,
    query_position: Tensor,
    scale: float | None = None,
    shared: bool | None = None,
) -> Explanation:
    """Every implementation of `paged_attention` with "yes", or the reason why it cannot run this call."""
    return explain_table(TABLE, _checked(q, slabs, block_table, query_position, scale, shared))


def _checked(
    q: Tensor,
    slabs: Sequence[Pages],
    block_table: Tensor,
    query_position: Tensor,
    scale: float | None,
    shared: bool | None,
) -> PagedCall:
    check_tensor("q", q, "[N, T, Hq, D]", [None] * 4)
    check_floating("q", q)
    check_slabs(slabs, like=q)
    sequences, queries, heads, dim = q.shape
    # without a slab every table is empty, and heads decide one by one as well as together
    slabs = slabs or [_no_pages(q)]
    check_table(block_table, slabs, q, sequences)
    deciding, together = block_table.shape[1], slabs[0].k.shape[2]
    if deciding * together == 0 or heads % (deciding * together) != 0:
        got = f"{deciding} of them, each for {together} heads"
        raise wrong("block_table", f"rows whose key/value heads divide the {heads} heads of q", got)
    check_tensor("query_position", query_position, "[N, T]", [sequences, queries], like=q)
    check_integer("query_position", query_position)
    check_range("query_position", query_position, -1, NEVER)
    if shared is not None and not isinstance(shared, bool):
        raise wrong("shared", "True, False or None", shared)
    if (
        shared is False
        and values_are_checked(block_table)
        and bool((users(block_table, total(slabs))[:-1] > 1).any())
    ):
        raise wrong("shared", "True or None where a page is listed twice", shared)
    _check_no_gradient(q, slabs)
    return PagedCall(
        q=q,
        slabs=slabs,
        block_table=block_table,
        query_position=torch.where(query_position < 0, NEVER, query_position).to(torch.int32),
        scale=dim**-0.5 if scale is None else float(scale),
        shared=shared,
    )


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
        raise wrong(
            "q",
            "no gradient, of q or of slabs, in an op for inference",
            f"grad required by {wanting[0]}",
        )


def _run_reference(call: PagedCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.paged_attention.reference import reference

    return reference(call)


def _run_pages(call: PagedCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.paged_attention.pages import pages

    return pages(call)


def _refused_by_triton(call: PagedCall) -> str | None:
    if call.q.dtype == torch.float64:
        return "it computes in float32 at the most"
    if call.q.shape[3] > 256:
        return f"a tile holds head sizes up to 256, not {call.q.shape[3]}"
    return without_triton(call.q)


def _run_triton(call: PagedCall) -> tuple[Tensor, Tensor]:
    from hamblocks_ops.paged_attention.triton import triton_attention

    return triton_attention(call)


TABLE = (
    Implementation("triton", _refused_by_triton, lambda: _run_triton, interpreted),
    Implementation("pages", always, lambda: _run_pages),
    Implementation("reference", always, lambda: _run_reference),
)
