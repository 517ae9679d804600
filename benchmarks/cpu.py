"""Times ops, implementations and the layer on a CPU, from one table of shapes.

`test_cpu.py` runs it under pytest-benchmark (`make bench`). Every line of `TABLE` is a race: calls
that do the same work or replace each other, timed in turns. Nothing is timed before its result was
compared with the reference at the shape that is timed. A ratio is the median over rounds of the
time of a call over that of the race's baseline in the same round, with a 95 % interval (bootstrap).
Beside every time stand its floor (measuring/floors.py) and the most memory that the call holds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from cases import Shape
from compare import ratio_of
from measuring import attention_calls, delta_calls, layer_calls, small_calls
from measuring.clock import Clock, Contender, NotHereError, reason
from measuring.costs import peak_bytes
from measuring.counts import count, decode_step
from measuring.floors import Ceilings, Work
from measuring.report import machine

import hamblocks as hb

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

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
        calls: names of the calls. pytest-benchmark times the first, which is not the baseline.
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
        """Op, first call, pass and sizes in words; every race of a table has another name."""
        shape = self.shape
        return (
            f"{self.what}, {self.calls[0]}, {self.run}, T = {shape.tokens}, {shape.heads} heads of "
            f"{shape.head_dim}, keep fraction {shape.fraction:g}"
        )

    def small(self) -> Race:
        """The race at 512 tokens, to try it: no ratio is bounded there."""
        return self._replace(shape=self.shape._replace(tokens=512), bounds={})


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
    Race("selected_attention", at(OPS, 2048), "forward", (FLEX, SDPA), SDPA),
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
"""A race has as many rounds as fit this time, within the two numbers above."""
Call = Callable[[], object]
Timer = Callable[[Sequence[Call], int], Sequence[Sequence[float]]]
"""Times calls for a number of rounds, and returns the seconds of each call in each round."""


def in_turns(benchmark: BenchmarkFixture, calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Times the first call by pytest-benchmark, and the others in the same rounds.

    The others run before the first call in one round, and after it in reverse order in the next.
    """
    first, *others = calls
    times: list[list[float]] = [[] for _ in others]
    pairs = list(zip(others, times, strict=True))
    # the parts of a round around the first call: before, after, before, after, ...
    parts = cycle((pairs, (), (), pairs[::-1]))

    def time_others() -> None:
        for call, took in next(parts):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)

    benchmark.pedantic(first, setup=time_others, teardown=time_others, rounds=rounds)
    return [benchmark.stats.stats.data, *times]


def measure(race: Race, timer: Timer) -> list[dict[str, Any]]:
    """Checks the calls of a race, times those that are right, and returns a measurement for each.

    A call that is not timed has a "reason" instead, and "is_missing": whether all that is wrong is
    that an optional package is not installed.
    """
    torch.manual_seed(0)
    makers, made, found = MAKERS[race.what](race.shape, race.run), {}, {}
    turn = 0.0
    for name in race.calls:
        one: dict[str, Any] = {"what": race.what, "pass": race.run, "case": name}
        found[name] = one | race.shape._asdict()
        try:
            contender = makers[name]()
            found[name]["checked"] = contender.check()
            began = time.perf_counter()
            contender.call()
            turn += time.perf_counter() - began
            found[name]["peak_bytes"] = peak_bytes(contender.call)
            made[name] = contender
        except Exception as error:
            found[name] |= {"reason": reason(error), "is_missing": isinstance(error, NotHereError)}
    if not made:
        return list(found.values())
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(SECONDS / turn)))
    timed = timer([contender.call for contender in made.values()], rounds)
    times = dict(zip(made, timed, strict=True))
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


def fails(one: dict[str, Any]) -> bool:
    """Whether a call is too slow, or was not timed though nothing is missing."""
    return is_above(one) or not one.get("is_missing", True)


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


class Result:
    """What a session has measured.

    Attributes:
        measurements: of all races.
        ceilings: the fastest of all, because load makes a rate lower than what a call may reach.
    """

    def __init__(self) -> None:
        self.clock = Clock("cpu", 5)
        self.ceilings = Ceilings(0, 0)
        self.measurements: list[dict[str, Any]] = []

    def add(self, race: Race, timer: Timer) -> list[dict[str, Any]]:
        """Measures the ceilings, then a race, and returns the measurements of it with floors."""
        rates = self.clock.ceilings(1024, 2**26, torch.float32)
        self.ceilings = Ceilings(*(max(pair) for pair in zip(self.ceilings, rates, strict=True)))
        measured = measure(race, timer)
        self.measurements += measured
        for one in self.measurements:
            if "seconds" in one:
                one["floor"] = Work(one["operations"], one["bytes"]).floor(self.ceilings)
        return measured

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file, with the counts of one decoded token."""
        return {
            "machine": machine(gpu=False),
            "when": time.strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
            "measurements": self.measurements,
            "ceilings": self.ceilings._asdict(),
            "growth": growth(self.measurements),
            "counts": count(decode_step(True, hb.SelectedAttention()))._asdict(),
        }
