"""Times ops, implementations and the layer on a CPU, from one table of shapes.

    python benchmarks/cpu.py [--only TEXT] [--long] [--rounds N] [--out FILE]

Every line of `TABLE` is a race: calls that do the same work or replace each other, timed in turns.
Nothing is timed before its result was compared with the reference at the shape that is timed. A
ratio is the median over rounds of the time of a call over that of the race's baseline in the same
round, with a 95 % interval (bootstrap). Beside every time stand its floor (measuring/floors.py) and
the most memory that the call holds. The result is a JSON file; `charts.py` draws it. Exits with 1 if
the interval of a ratio lies above its bound.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Shape
from compare import ratio_of
from measuring import attention_calls, delta_calls, layer_calls, small_calls
from measuring.clock import Clock, Contender, reason
from measuring.costs import peak_bytes
from measuring.counts import count, decode_step
from measuring.floors import Ceilings, Work
from measuring.report import machine

import hamblocks as hb

MAKERS: dict[str, Callable[[Shape, str], dict[str, Callable[[], Contender]]]] = {
    "gated_delta_rule": delta_calls.make,
    "selected_attention": attention_calls.make,
    "small ops": small_calls.make,
    "layer": layer_calls.make,
    "growth": layer_calls.make_growth,
}
"""What makes the calls of a race by name; they are made when they are measured, not before."""


class Race(NamedTuple):
    """Calls that are timed in turns.

    Attributes:
        what: a key of `MAKERS`.
        shape: sizes.
        run: "forward", "both" (forward and backward), "prefill" or "decode".
        calls: names of the calls.
        baseline: the call that the others are divided by; None: no ratio.
        bounds: the largest ratio allowed, by name of the call.
    """

    what: str
    shape: Shape
    run: str
    calls: tuple[str, ...]
    baseline: str | None = None
    bounds: dict[str, float] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        """Op, sizes and pass in words."""
        shape = self.shape
        return (
            f"{self.what}, {self.run}, T = {shape.tokens}, {shape.heads} heads of "
            f"{shape.head_dim}, keep fraction {shape.fraction:g}"
        )


OPS = Shape()
LAYER = Shape(heads=8, hidden=512)
SDPA, GATHER, FLEX = "everything by SDPA", "gather", "flex"
BARE, SCORED = "no residual", "no residual, cosine score"
TOPK, TOPK_EARLY = "select_topk", "select_topk of T / 8"
LATE, EARLY = "TopK(256)", "TopK(256) after T / 8"
PEER, NAIVE, TOKENS = "transformers", "fla's naive chunks", "token by token"
HAM, ALL, ALONE = "HAM", "HAM, everything stored", "attention over everything, no memory"


def at(shape: Shape, tokens: int, fraction: float = 0.25) -> Shape:
    """The shape with other sizes."""
    return shape._replace(tokens=tokens, fraction=fraction)


TABLE = (
    Race("gated_delta_rule", at(OPS, 512), "forward", ("chunked", TOKENS, NAIVE), TOKENS),
    *(
        Race("gated_delta_rule", at(OPS, tokens), run, ("chunked", PEER), PEER, {"chunked": bound})
        for tokens in (1024, 4096)
        for run, bound in (("forward", 0.5), ("both", 0.4))
    ),
    # forward alone: the gradient of the reference takes minutes at this length
    Race("gated_delta_rule", at(OPS, 16384), "forward", ("chunked", PEER), PEER, {"chunked": 0.5}),
    Race("gated_delta_rule", at(OPS, 4096), "forward", (SCORED, BARE), BARE),
    *(
        Race("selected_attention", at(OPS, 8192, f), run, (GATHER, SDPA), SDPA, {GATHER: f + more})
        for f in (0.5, 0.25, 0.1)
        for run, more in (("forward", 0.06), ("both", 0.1))
    ),
    *(
        Race("selected_attention", at(OPS, tokens), run, (GATHER, SDPA), SDPA)
        for tokens in (1024, 2048, 4096)
        for run in ("forward", "both")
    ),
    Race("selected_attention", at(OPS, 2048), "forward", (GATHER, SDPA, FLEX), SDPA),
    Race("small ops", at(OPS, 16384), "forward", ("surprise", "compact")),
    Race("small ops", at(OPS, 65536), "forward", (TOPK, TOPK_EARLY), TOPK_EARLY, {TOPK: 24}),
    *(
        Race("layer", at(LAYER, tokens, f), run, (HAM, ALL, ALONE), ALL)
        for tokens, f, run in (
            (1024, 0.25, "both"),
            (2048, 0.25, "both"),
            (4096, 0.25, "both"),
            (8192, 0.25, "both"),
            (4096, 0.1, "both"),
            (4096, 0.25, "forward"),
            (4096, 0.25, "prefill"),
            (8192, 0.25, "decode"),
        )
    ),
    Race("layer", at(LAYER, 8192, 0.1), "decode", (HAM, ALL, ALONE), ALL, {HAM: 0.6}),
    Race("layer", at(LAYER, 8192), "decode", (LATE, EARLY), EARLY, {LATE: 1.15}),
)
LONG = (
    Race("layer", at(LAYER, 16384), "both", (HAM, ALL, ALONE), ALL, {HAM: 0.45}),
    *(
        Race("growth", at(LAYER, tokens), "forward", ("512 tokens stored",))
        for tokens in (2048, 8192, 32768, 65536)
    ),
)
"""Takes minutes; with `--long` alone."""
ROUNDS, LEAST_ROUNDS = 21, 5
SECONDS = 6.0
"""A race stops after this time if it has had the least number of rounds."""


def measure(race: Race, clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """Checks and times the calls of a race, and returns a measurement for each."""
    torch.manual_seed(0)
    makers, made, found = MAKERS[race.what](race.shape, race.run), {}, {}
    for name in race.calls:
        one: dict[str, Any] = {"what": race.what, "pass": race.run, "case": name}
        found[name] = one | race.shape._asdict()
        try:
            contender = makers[name]()
            found[name]["checked"] = contender.check()
            contender.call()
            found[name]["peak_bytes"] = peak_bytes(contender.call)
            made[name] = contender
        except Exception as error:
            found[name]["reason"] = reason(error)
            clock.say(f"  {name}: {found[name]['reason']}")
    times: dict[str, list[float]] = {name: [] for name in made}
    until = time.perf_counter() + SECONDS
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() > until:
            break
        for name in made if turn % 2 else reversed(made):
            began = time.perf_counter()
            made[name].call()
            times[name].append(time.perf_counter() - began)
    for name, contender in made.items():
        one = found[name]
        lower, middle, upper = statistics.quantiles(times[name], n=4, method="inclusive")
        one |= {"seconds": middle, "quartiles": [lower, upper], **contender.work._asdict()}
        if race.baseline in made and name != race.baseline:
            one["baseline"] = race.baseline
            one["ratio"] = ratio_of(times[name], times[race.baseline])._asdict()
            one["memory_ratio"] = one["peak_bytes"] / max(1, found[race.baseline]["peak_bytes"])
        if name in race.bounds:
            one["bound"] = race.bounds[name]
    return list(found.values())


def line(one: dict[str, Any]) -> str:
    """A measurement as a line."""
    if "seconds" not in one:
        return f"  {one['case']:38} not timed ({one['reason']})"
    text = f"  {one['case']:38} {1e3 * one['seconds']:9.2f} ms"
    text += f"  {one['peak_bytes'] / 2**20:8.1f} MB"
    if "ratio" in one:
        ratio = one["ratio"]
        text += f"  {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        text += f"  memory {one['memory_ratio']:.2f}"
    if "bound" in one:
        text += f"  bound {one['bound']:.2f}" + ("  ABOVE" if is_above(one) else "")
    return text


def is_above(one: dict[str, Any]) -> bool:
    """Whether the whole interval of a ratio lies above its bound."""
    return "bound" in one and "ratio" in one and one["ratio"]["low"] > one["bound"]


def growth(measurements: list[dict[str, Any]]) -> float | None:
    """The exponent of T in the time of the layer at a fixed number of stored tokens."""
    points = [
        (math.log(x["tokens"]), math.log(x["seconds"]))
        for x in measurements
        if x["what"] == "growth" and "seconds" in x
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="races whose names hold this text")
    parser.add_argument("--long", action="store_true", help="the long races, and only those")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at the most")
    parser.add_argument("--small", action="store_true", help="512 tokens, to try the command")
    parser.add_argument("--out", type=Path, default=Path("out/bench-cpu.json"))
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: expected 2 or more")
    clock = Clock("cpu", 5)
    best = Ceilings(0, 0)
    result: dict[str, Any] = {
        "machine": machine(gpu=False),
        "when": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "measurements": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for race in LONG if given.long else TABLE:
        if given.only not in race.name:
            continue
        if given.small:
            race = race._replace(shape=race.shape._replace(tokens=512), bounds={})
        clock.say(race.name)
        # the fastest of all, because load makes a rate lower than what a call may reach
        rates = zip(best, clock.ceilings(1024, 2**26, torch.float32), strict=True)
        best = Ceilings(*(max(pair) for pair in rates))
        for one in measure(race, clock, given.rounds):
            print(line(one), flush=True)
            result["measurements"].append(one)
        result |= {"ceilings": best._asdict(), "growth": growth(result["measurements"])}
        for one in result["measurements"]:
            if "seconds" in one:
                one["floor"] = Work(one["operations"], one["bytes"]).floor(best)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    if not result["measurements"]:
        sys.exit(f"--only: expected a part of a name, got {given.only!r}")
    if result["growth"] is not None:
        print(f"the layer's time grows like T ** {result['growth']:.2f}")
    result["counts"] = count(decode_step(True, hb.SelectedAttention()))._asdict()
    print(f"one decoded token of one layer: {result['counts']}")
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    above = [one for one in result["measurements"] if is_above(one)]
    if above:
        sys.exit(f"{len(above)} above their bounds")


if __name__ == "__main__":
    main()
