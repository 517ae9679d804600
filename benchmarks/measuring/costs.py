"""What one call costs beside its time: memory, and launches of kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def costs(call: Callable[[], object], gpu: bool) -> dict[str, Any]:
    """Runs a call, on a GPU twice, and returns what it takes.

    Returns:
        On a GPU `peak_bytes`, the most memory that the call holds beside what is there before it,
        and `launches`, the kernels, copies and fills that it starts. On a CPU `torch_ops`, the ops
        of torch that no other op called.
    """
    if not gpu:
        # a dispatch mode would count too, but torch compiles nothing while one is active
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            call()
        return {"torch_ops": sum(outermost(event) for event in watched.events())}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": peak, "launches": sum(launched(traced(call)).values())}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call on a CPU holds beside what is there before it, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    recorded = watched.profiler.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in recorded if one.name() == "[memory]"]
    held = accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))
    return max(held, default=0)


def outermost(event: Any) -> bool:
    """Whether an event of the profiler is an op of torch that no other op called."""
    parent = event.cpu_parent
    called = parent is not None and parent.name.startswith("aten::")
    return event.name.startswith("aten::") and not called


def traced(call: Callable[[], object]) -> profile:
    """A profiler that has watched one call on a GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize()
    return watched


def launched(watched: Any) -> Counter[str]:
    """What the device ran, by name."""
    return Counter(event.name for event in watched.events() if event.device_type == DeviceType.CUDA)
