"""Measures the ops and the layer on a GPU and writes a JSON file with times, floors and targets.

    python benchmarks/gpu.py [--out benchmarks/results]
                             [--only smoke attention layer decode delta sweep] [--minutes 8]
                             [--contexts 8192 ...] [--rounds 15] [--device cuda]

smoke      every implementation once, forward and backward, against the reference; one profile
delta      the gated delta rule with its score, and with its residual, against fla's function
attention  selected attention at several keep fractions, against causal attention over everything
layer      a layer that stores half of its tokens, against the same layer that stores all
decode     tokens per second and cache bytes of one layer after a context, by keep fraction, eager
           and replayed from a CUDA graph
sweep      launches of the Triton kernels of attention, and the line of the fastest to paste

Calls that are compared take turns in one run. A call is timed only after its results were checked
at the same shape. A failure (out of memory, a missing implementation) is recorded with its reason,
and the other measurements continue. Every time stands beside its floor (see measuring/floors.py),
what was estimated before any run (measuring/estimates/), the time of the host, the peak memory
and the number of launches. A part stops after `--minutes`.
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
from measuring import attend, decode, delta, layer, report, smoke, sweep
from measuring.clock import Clock, reason
from measuring.sizes import SMALL, Sizes
from measuring.targets import judge

PARTS = {
    "smoke": smoke,
    "attention": attend,
    "layer": layer,
    "decode": decode,
    "delta": delta,
    "sweep": sweep,
}
"""In the order in which they are measured."""
MINUTES = 8.0
"""How long a part measures; a result in hand before a run is cut off is worth more than its last
shape."""
MIN_ROUNDS = 2
"""Quartiles need two times."""


def measure(
    sizes: Sizes,
    parts: list[str],
    rounds: int,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
    minutes: float = MINUTES,
) -> dict[str, Any]:
    """Measures the named parts at all shapes.

    Args:
        sizes: the sizes.
        parts: keys of `PARTS`.
        rounds: how often each call is timed.
        save: called after every measurement with the result so far, so that a run that is stopped
            early leaves one.
        minutes: how long a part measures; what it has not begun by then gets that as its reason.

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
            if name != "traces"  # a folder of this machine
        },
        "rounds": rounds,
        "ceilings": ceilings._asdict(),
        # what estimates assume; its rates beside those measured show whether the chip is at fault
        "chip": clock.chip and clock.chip._asdict() | {"ceilings": clock.chip.ceilings._asdict()},
        "measurements": measurements,
        "targets": [],
    }

    def add(one: dict[str, Any]) -> None:
        measurements.append(one)
        result["seconds"] = time.perf_counter() - clock.began
        result["targets"] = judge(measurements)
        save(result)

    for name in (name for name in PARTS if name in parts):
        clock.until = time.perf_counter() + 60 * minutes
        for shape in PARTS[name].shapes(sizes):
            torch.manual_seed(0)
            try:
                clock.in_time()
                for one in PARTS[name].measure(shape, sizes, clock, ceilings):
                    add(one)
            except Exception as error:
                add({"part": name, "tokens": shape, "case": "all", "reason": reason(error)})
                clock.say(f"{name}, {shape:,} tokens: {reason(error)}")
            clock.release()
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
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="how long a part measures at the most"
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each call is timed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def written(path: Path, result: dict[str, Any]) -> None:
    """Writes the result beside the file and then puts it in its place, so that none is half there."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


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
        result = measure(sizes, given.only, given.rounds, minutes=given.minutes)
        report.show(result["measurements"], result["targets"])
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a CUDA device, got none")
    given.out.mkdir(parents=True, exist_ok=True)
    parts = "gpu" if set(given.only) == set(PARTS) else "-".join(given.only)
    path = given.out / f"{parts}-{torch.cuda.get_device_name().replace(' ', '-').lower()}.json"
    sizes = sizes._replace(traces=given.out)
    result = measure(
        sizes,
        given.only,
        given.rounds,
        lambda result: written(path, result),
        given.minutes,
    )
    report.show(result["measurements"], result["targets"])
    print(path)


if __name__ == "__main__":
    main()
