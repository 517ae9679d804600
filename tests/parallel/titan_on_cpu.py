"""torchtitan on a CPU: replaces the three places that need an accelerator, which no option reaches.

    torchrun --nproc-per-node 2 tests/parallel/titan_on_cpu.py --module hamblocks.titan \\
        --config ham_debugmodel

is `torchrun --nproc-per-node 2 -m torchtitan.train ...` with gloo. Importing this file chooses the
device for a process.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from typing import Any
from unittest import mock

import torch

# torchtitan takes the first accelerator, and cuda where there is none: here it takes the CPU
with (
    warnings.catch_warnings(),
    mock.patch.object(torch._utils, "_get_available_device_type", return_value="cpu"),
):
    warnings.simplefilter("ignore")
    import torchtitan.components.metrics as titan_metrics


class NoMonitor:
    """The memory of a device that has no counters."""

    device_name, device_capacity_gib = "cpu", 1.0

    def get_peak_stats(self) -> Any:
        return titan_metrics.DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def main() -> None:
    import torchtitan.distributed.utils as titan_distributed

    titan_metrics.build_device_memory_monitor = NoMonitor
    # it waits at a barrier for the current device, whose number is "cpu" here
    titan_distributed.set_pg_timeouts = lambda *_, **__: None
    sys.argv[0] = "torchtitan.train"
    runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
