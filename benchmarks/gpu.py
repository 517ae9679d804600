"""Measures the ops and the layer on a GPU and writes a JSON file with times, floors and targets.

    python benchmarks/gpu.py [--out benchmarks/results] [--only delta attention layer decode]
                             [--contexts 8192 ...] [--rounds 15] [--device cuda]

delta      the gated delta rule with its score, and with its residual, against fla's function
attention  selected attention at several keep fractions, against causal attention over everything
layer      a layer that stores half of its tokens, against the same layer that stores all
decode     tokens per second and cache bytes of one layer after a context, by keep fraction

Calls that are compared take turns in one run. A call is timed only after its results were checked
at the same shape. A failure (out of memory, a missing implementation) is recorded with its reason,
and the other measurements continue. Every time stands beside its floor (see measuring/floors.py).
`--device cpu` runs everything at a small size, to try the script, and writes nothing.
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
MIN_ROUNDS = 2
"""Quartiles need two times."""


def measure(
    sizes: Sizes,
    parts: list[str],
    rounds: int,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Measures the named parts at all shapes.

    Args:
        sizes: the sizes.
        parts: keys of `PARTS`.
        rounds: how often each call is timed.
        save: called after every shape with the result so far, so that a run that is stopped early
            leaves one.

    Returns:
        The result, as it is written to the JSON file.
    """
    clock = Clock(sizes.device, rounds)
    ceilings = clock.ceilings(sizes.matmul, sizes.copied_bytes, sizes.dtype)
    measurements: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "machine": report.machine(sizes.gpu),
        "when": time.strftime("%Y-%m-%d"),
        "sizes": {
            name: size if isinstance(size, (int, tuple)) else str(size)
            for name, size in sizes._asdict().items()
        },
        "rounds": rounds,
        "ceilings": ceilings._asdict(),
        "measurements": measurements,
        "targets": [],
    }
    for name in parts:
        part = PARTS[name]
        for shape in part.shapes(sizes):
            torch.manual_seed(0)
            try:
                measurements.extend(part.measure(shape, sizes, clock, ceilings))
            except Exception as error:
                failed = {"part": name, "tokens": shape, "case": "all", "reason": reason(error)}
                measurements.append(failed)
                clock.say(f"{name}, {shape:,} tokens: {reason(error)}")
            clock.release()
            seconds = time.perf_counter() - clock.began
            result |= {"targets": judge(measurements), "seconds": seconds}
            save(result)
    return result


def options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="parts to measure; all of them by default",
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="tokens before those that are decoded"
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each call is timed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def main() -> None:
    """Measures and, on a GPU, writes the JSON file."""
    given = options()
    if given.rounds < MIN_ROUNDS:
        sys.exit(f"benchmarks/gpu.py: expected --rounds of {MIN_ROUNDS} or more, got fewer")
    sizes = SMALL if given.device == "cpu" else Sizes()
    if given.contexts:
        sizes = sizes._replace(contexts=tuple(given.contexts))
    if not sizes.gpu:
        torch.set_num_threads(1)  # a second thread slows down tensors of this size
        result = measure(sizes, given.only, given.rounds)
        report.show(result["measurements"], result["targets"])
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, got none")
    given.out.mkdir(parents=True, exist_ok=True)
    parts = "gpu" if set(given.only) == set(PARTS) else "-".join(given.only)
    path = given.out / f"{parts}-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    result = measure(
        sizes,
        given.only,
        given.rounds,
        lambda result: path.write_text(json.dumps(result, indent=1) + "\n"),
    )
    report.show(result["measurements"], result["targets"])
    print(path)


if __name__ == "__main__":
    main()
