"""Measures the ops and the layer on a GPU and writes one JSON: times, their floors, and which targets are met.

    python benchmarks/gpu.py [--out benchmarks/results] [--only delta attention layer decode] [--rounds 15]

delta      the gated delta rule with its score, and with its residual, against fla's public function
attention  selected attention at keep fractions 0.5, 0.25, 0.1, against causal attention over everything, and flex
layer      a whole layer that stores half of its tokens, against the same layer that stores all
decode     tokens per second and bytes of one layer behind a context, at several keep fractions

What is compared takes turns in one run. A shape is timed only after its results were found right there; what fails, for
want of memory or of an implementation, is written down with its reason and stops nothing else. Beside a time stands its
floor (see measuring/floors.py). `--device cpu` runs the same at a small size, to try the script; it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import attend, decode, delta, layer, report
from measuring.clock import Clock, reason
from measuring.sizes import SMALL, Sizes
from measuring.targets import judge

PARTS = {"delta": delta, "attention": attend, "layer": layer, "decode": decode}


def measure(
    sizes: Sizes,
    parts: list[str],
    rounds: int,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """All of it; `save` gets what there is after every shape, for a run that is ended early."""
    clock = Clock(sizes.device, rounds)
    ceilings = clock.ceilings(sizes.matmul, sizes.copied_bytes, sizes.dtype)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "machine": report.machine(sizes.gpu),
        "when": time.strftime("%Y-%m-%d"),
        "sizes": {
            name: size if isinstance(size, (int, tuple)) else str(size)
            for name, size in sizes._asdict().items()
        },
        "rounds": rounds,
        "ceilings": ceilings._asdict(),
        "rows": rows,
        "targets": [],
    }
    for name in parts:
        part = PARTS[name]
        for shape in part.shapes(sizes):
            torch.manual_seed(0)
            try:
                rows.extend(part.rows(shape, sizes, clock, ceilings))
            except Exception as error:
                rows.append({"part": name, "tokens": shape, "case": "all", "reason": reason(error)})
                clock.say(f"{name}, {shape:,} tokens: {reason(error)}")
            clock.release()
            result |= {"targets": judge(rows), "seconds": time.perf_counter() - clock.began}
            save(result)
    return result


def main() -> None:
    """Measures and, on a GPU, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="tokens before those that are decoded"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.rounds < 2:
        sys.exit("benchmarks/gpu.py: expected --rounds of 2 or more, got fewer")
    sizes = SMALL if options.device == "cpu" else Sizes()
    if options.contexts:
        sizes = sizes._replace(contexts=tuple(options.contexts))
    if not sizes.gpu:
        torch.set_num_threads(1)  # tensors this small are not worth a second one
        result = measure(sizes, options.only, options.rounds)
        report.show(result["rows"], result["targets"])
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, got none")
    options.out.mkdir(parents=True, exist_ok=True)
    parts = "gpu" if set(options.only) == set(PARTS) else "-".join(options.only)
    path = options.out / f"{parts}-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    result = measure(
        sizes,
        options.only,
        options.rounds,
        lambda result: path.write_text(json.dumps(result, indent=1) + "\n"),
    )
    report.show(result["rows"], result["targets"])
    print(path)


if __name__ == "__main__":
    main()
