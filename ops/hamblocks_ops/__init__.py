"""The ops of hamblocks: delta rule, surprise, token lifetimes, attention over stored tokens.

Each op checks its arguments, picks an implementation and explains the choice with
`op.explain(...)`. `OPS` lists all ops. The letters in shapes (B, T, H, Hkv, ...) have one legend,
docs/reference/shapes.md. Importing needs torch alone.
"""

from typing import Any

from hamblocks_ops.arguments import value_checks
from hamblocks_ops.compact import Compacted, compact
from hamblocks_ops.declare import Op
from hamblocks_ops.dispatch import Explanation, UnsupportedError, explain, implementations
from hamblocks_ops.gated_delta_rule import DeltaRuleOutput, gated_delta_rule
from hamblocks_ops.packing import NEVER
from hamblocks_ops.paged_attention import PagedRows, PageMemo, Pages, paged_attention, unpage
from hamblocks_ops.select import select_first, select_threshold, select_topk, select_window
from hamblocks_ops.selected_attention import AttentionOutput, selected_attention
from hamblocks_ops.surprise import surprise

OPS: tuple[Op[..., Any], ...] = (
    gated_delta_rule,
    surprise,
    select_threshold,
    select_topk,
    select_window,
    select_first,
    compact,
    selected_attention,
    paged_attention,
)
"""All ops."""

__all__ = [
    "NEVER",
    "OPS",
    "AttentionOutput",
    "Compacted",
    "DeltaRuleOutput",
    "Explanation",
    "PageMemo",
    "PagedRows",
    "Pages",
    "UnsupportedError",
    "compact",
    "explain",
    "gated_delta_rule",
    "implementations",
    "paged_attention",
    "select_first",
    "select_threshold",
    "select_topk",
    "select_window",
    "selected_attention",
    "surprise",
    "unpage",
    "value_checks",
]
