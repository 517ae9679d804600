"""Lists of the tokens that are ever stored, without gaps, as attention over stored keys needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hamblocks_ops.arguments import check_integer, check_tensor, values_are_checked, wrong
from hamblocks_ops.compact import scatter
from hamblocks_ops.compact.call import CompactCall, Compacted
from hamblocks_ops.declare import Hints, op_with_choice
from hamblocks_ops.dispatch import Implementation, interpreted, without_triton
from hamblocks_ops.packing import int32
from hamblocks_ops.select import check_count, check_placed, placed

__all__ = ["Compacted", "compact"]


def _refused_by_triton(call: CompactCall) -> str | None:
    return without_triton(call.evict_at)


def _run_triton(call: CompactCall) -> Compacted:
    from hamblocks_ops.compact.triton import run

    return run(call)


def _example(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    evict_at = torch.ones(x.shape[:3], dtype=torch.int32, device=x.device)
    return (evict_at,), {"capacity": x.shape[1]}


@op_with_choice(
    Implementation("triton", _run_triton, _refused_by_triton, passed_over=interpreted, opaque=True),
    Implementation("scatter", scatter.run),
    finish=lambda _call, lists: lists,
    hints=Hints(
        causal="it lists what is stored, which the future decides",
        traced="its result is as long as the longest list, which is read from the device",
        by_token=("evict_at",),
        by_sequence=("lengths",),
        lists=("index", "position", "evict_at"),
    ),
    example=_example,
)
def compact(
    evict_at: Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
    impl: str = "auto",
) -> Compacted:
    """Lists the tokens that are ever stored (evict_at > position), for every batch row and head.

    Args:
        evict_at: int32 `[B, T, H]`.
        position: as in `select_threshold`.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.
        capacity: length L of the lists; None: the longest list, which is read from the device. With
            `capacity`, and where values are not checked, nothing waits for the device.
        impl: "triton" (a GPU, two kernels), "scatter" (torch, any device), or "auto".

    Returns:
        Compacted lists of length L.

    Raises:
        ValueError: a bad argument, or (where values are checked) more stored tokens than
            `capacity`.
        UnsupportedError: `impl` cannot run this call.
    """
    evict_at = int32(evict_at)
    where, sequence = placed(evict_at, position, cu_seqlens)
    if capacity is None:
        counts = (evict_at > where).sum(1)
        capacity = int(counts.max()) if counts.numel() else 0
    sequences = evict_at.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return compact.request(CompactCall(evict_at, where, sequence, sequences, capacity), impl)


@compact.check
def _check_compact(
    evict_at: Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
    impl: str = "auto",
) -> None:
    check_tensor("evict_at", evict_at, "[B, T, H]", [None] * 3)
    check_integer("evict_at", evict_at)
    check_placed(evict_at, position, cu_seqlens)
    if capacity is None:
        return
    check_count("capacity", capacity)
    if values_are_checked(evict_at) and evict_at.numel():
        evict_at = int32(evict_at)
        where, _ = placed(evict_at, position, cu_seqlens)
        most = int((evict_at > where).sum(1).max())
        if most > capacity:
            raise wrong("capacity", f"at least the {most} tokens that are stored", str(capacity))
