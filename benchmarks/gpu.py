"""Measures decoding on a GPU and writes one JSON: tokens per second and bytes, against attention over everything.

    python benchmarks/gpu.py [--out benchmarks/results] [--contexts 8192 32768 131072]

For each context one layer decodes a batch, one token per call, at several keep fractions; 1 stores everything. Beside a
time stands its floor: the bytes of the pages in use over the bandwidth that a plain copy reaches on the same device in
the same run; and for each context the time of scaled_dot_product_attention over a dense cache of all tokens, alone,
without projections, memory and cache. A shape is timed only after the read of its cache was found to be as right as
the dense reference may claim to be. `--device cpu` runs the same at a small size, to try the script; it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import hamblocks as hb
from hamblocks.ops import explain, paged_attention

FRACTIONS = (1.0, 0.5, 0.25, 0.1)


class Sizes(NamedTuple):
    """Of the layer that is measured."""

    hidden: int = 2048
    heads: int = 16
    head_dim: int = 128
    batch: int = 8
    piece: int = 4096
    dtype: torch.dtype = torch.bfloat16


SMALL = Sizes(hidden=64, heads=4, head_dim=16, batch=2, piece=64, dtype=torch.float32)


def seconds(call: Callable[[], object], device: str, rounds: int = 20) -> float:
    """Median time of one call, the device's own where it has a clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device == "cpu":
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth(device: str, nbytes: int) -> float:
    """Bytes per second that a copy reads and writes."""
    x = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)
    return 2 * nbytes / seconds(lambda: y.copy_(x), device)


@torch.no_grad()
def decode(context: int, fraction: float, device: str, sizes: Sizes) -> dict[str, Any]:
    """Time and bytes of one token of every sequence behind a context."""
    torch.manual_seed(0)
    selector = hb.Threshold(float("-inf") if fraction == 1 else 1 - fraction)
    layer = hb.HAMLayer(sizes.hidden, sizes.heads, head_dim=sizes.head_dim, gate=hb.RandomRouting(), selector=selector)
    layer = layer.to(device, sizes.dtype).eval()
    state = layer.init_state(sizes.batch)
    for piece in torch.arange(context).split(sizes.piece):
        x = torch.randn(sizes.batch, len(piece), sizes.hidden, device=device, dtype=sizes.dtype)
        _, state, _ = layer.prefill(x, state)
    one = state.cache.fork().reorder(torch.zeros(1, dtype=torch.int64, device=device))
    q = torch.randn(1, 1, sizes.heads, sizes.head_dim, device=device, dtype=sizes.dtype)
    arguments = q, one.slabs, one.block_table
    asked = one.seen[:, None]
    exactly = [slab._replace(k=slab.k.double(), v=slab.v.double()) for slab in one.slabs]
    exact = paged_attention(q.double(), exactly, one.block_table, query_position=asked, impl="reference").out
    error, own = (
        float((paged_attention(*arguments, query_position=asked, impl=impl).out.double() - exact).norm() / exact.norm())
        for impl in ("auto", "reference")
    )
    if not error <= 2 * own + torch.finfo(sizes.dtype).eps:
        sys.exit(
            f"paged_attention at context {context}, keep fraction {fraction}: error {error:.1e}, reference {own:.1e}"
        )
    table = explain(paged_attention, *arguments, query_position=asked)
    x = torch.randn(sizes.batch, sizes.hidden, device=device, dtype=sizes.dtype)
    state.reserve(32)

    def step() -> None:
        nonlocal state
        _, state, _ = layer.decode(x, state)

    took = seconds(step, device)
    return {
        "context": context,
        "keep_fraction": float(state.cache.tokens.double().mean() / state.position.double().mean()),
        "seconds": took,
        "tokens_per_second": sizes.batch / took,
        "cache_bytes": state.cache.nbytes,
        "capacity_bytes": state.cache.capacity_nbytes,
        "error": error,
        "impl": next(name for name, reason in table.items() if reason == "yes"),
    }


@torch.no_grad()
def everything(context: int, device: str, sizes: Sizes) -> float:
    """Time of attention over a dense cache of all tokens."""
    shape = sizes.batch, sizes.heads, context, sizes.head_dim
    k, v = (torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
    q = k[:, :, :1].clone()
    return seconds(lambda: scaled_dot_product_attention(q, k, v), device)


def measure(contexts: list[int], device: str, sizes: Sizes) -> dict[str, Any]:
    """All of it, a line each."""
    copy, rows, dense = bandwidth(device, 2**30 if device == "cuda" else 2**24), [], {}
    for context in contexts:
        dense[context] = everything(context, device, sizes)
        print(f"context {context:>7,}  a dense cache, attention alone: {1e6 * dense[context]:,.0f} us")
        for fraction in FRACTIONS:
            row = decode(context, fraction, device, sizes)
            row["floor_seconds"] = row["cache_bytes"] / copy
            rows.append(row)
            print(
                f"context {context:>7,}  keep {row['keep_fraction']:.2f}  {row['tokens_per_second']:>9,.0f} tokens/s  "
                f"{row['cache_bytes']:>14,} bytes  floor {1e6 * row['floor_seconds']:>8,.0f} us  "
                f"took {1e6 * row['seconds']:>8,.0f} us"
            )
    return {"copy_bytes_per_second": copy, "dense_seconds": dense, "decode": rows}


def main() -> None:
    """Measures and, on a GPU, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cpu":
        measure(options.contexts or [256], "cpu", SMALL)
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, got none")
    sizes = Sizes()
    result = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hamblocks": hb.__version__,
        "when": time.strftime("%Y-%m-%d"),
        "sizes": {name: str(size) for name, size in sizes._asdict().items()},
        **measure(options.contexts or [8192, 32768, 131072], "cuda", sizes),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decode-{result['device'].replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
