"""Measures decoding on a GPU and writes one JSON: tokens per second and bytes, against attention over everything.

    python benchmarks/gpu.py [--out benchmarks/results] [--contexts 8192 32768 131072]

For each context and keep fraction one layer decodes a batch, one token per call. Beside the time stands a floor: the
bytes of the kept keys and values over the bandwidth that a plain copy reaches on the same device in the same run. A
shape is timed only after its read of the cache was found to be that of the dense reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hamblocks as hb
from hamblocks.ops import explain, paged_attention

HIDDEN, HEADS, DIM, BATCH = 2048, 16, 128, 8
FRACTIONS = (1.0, 0.5, 0.25, 0.1)


def seconds(call: Any, rounds: int = 20) -> float:
    """Median of the device's time for one call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second that a copy reads."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x))


@torch.no_grad()
def decode(context: int, fraction: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Time and bytes of one token of every sequence behind a context."""
    torch.manual_seed(0)
    selector = hb.Threshold(float("-inf") if fraction == 1 else 1 - fraction)
    layer = hb.HAMLayer(HIDDEN, HEADS, head_dim=DIM, gate=hb.RandomRouting(), selector=selector)
    layer = layer.to("cuda", dtype).eval()
    state = layer.init_state(BATCH)
    for _ in range(context // 4096):
        _, state, _ = layer.prefill(torch.randn(BATCH, 4096, HIDDEN, device="cuda", dtype=dtype), state)
    one = state.cache.fork().reorder(torch.zeros(1, dtype=torch.int64, device="cuda"))
    q = torch.randn(1, 1, HEADS, DIM, device="cuda", dtype=dtype)
    arguments = (q, one.slabs, one.block_table)
    fast, exact = (
        paged_attention(*arguments, query_position=one.seen[:, None], impl=impl).out.double()
        for impl in ("auto", "reference")
    )
    error = float((fast - exact).norm() / exact.norm())
    if not error <= 2**-7:
        raise SystemExit(f"paged_attention at context {context}, keep fraction {fraction}: error {error:.1e}")
    x = torch.randn(BATCH, HIDDEN, device="cuda", dtype=dtype)
    state.reserve(64)

    def step() -> None:
        nonlocal state
        _, state, _ = layer.decode(x, state)

    took = seconds(step)
    return {
        "context": context,
        "keep_fraction": float(state.cache.tokens.float().mean() / state.position.float().mean()),
        "seconds": took,
        "tokens_per_second": BATCH / took,
        "cache_bytes": state.cache.nbytes,
        "capacity_bytes": state.cache.capacity_nbytes,
        "error": error,
        "impl": str(explain(paged_attention, *arguments, query_position=one.seen[:, None])),
    }


def main() -> None:
    """Measures, prints a line each and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, got none")
    copy = bandwidth()
    rows = []
    for context in options.contexts:
        for fraction in FRACTIONS:
            row = decode(context, fraction)
            row["floor_seconds"] = row["cache_bytes"] / copy
            rows.append(row)
            print(
                f"context {context:>7,}  keep {row['keep_fraction']:.2f}  {row['tokens_per_second']:>9,.0f} tokens/s  "
                f"{row['cache_bytes']:>14,} bytes  floor {1e6 * row['floor_seconds']:>8,.0f} us  "
                f"took {1e6 * row['seconds']:>8,.0f} us"
            )
    result = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hamblocks": hb.__version__,
        "when": time.strftime("%Y-%m-%d"),
        "shape": {"hidden": HIDDEN, "heads": HEADS, "head_dim": DIM, "batch": BATCH, "dtype": "bfloat16"},
        "copy_bytes_per_second": copy,
        "decode": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decode-{result['device'].replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
