"""Times calls that take turns on one device, each only after its check."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from measuring.floors import Ceilings, Work
from measuring.targets import key

FLUSHED = 2**28
"""Bytes zeroed before each call: several times any L2, so that no call finds its inputs there."""


class NotHereError(Exception):
    """Something to compare with that this machine lacks."""


class Contender(NamedTuple):
    """One of the calls that are compared.

    Attributes:
        row: what it is called in the result: its case, and what tells it from others.
        call: what is timed.
        check: returns what was compared and raises where it is wrong.
        work: what the call has to do at least.
    """

    row: dict[str, Any]
    call: Callable[[], object]
    check: Callable[[], dict[str, Any]]
    work: Work


class Timing(NamedTuple):
    """Median of the rounds and their quartiles, in seconds."""

    seconds: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """From the times of two rounds or more."""
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, lower, upper)


class Clock:
    """The clock of a device, and the progress told on the way."""

    def __init__(self, device: str, rounds: int) -> None:
        self.gpu, self.rounds, self.began = device == "cuda", rounds, time.perf_counter()
        self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if self.gpu else None

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"{time.perf_counter() - self.began:6.0f} s  {text}", flush=True)

    def wait(self) -> None:
        """Until the device has done all it was given; an error of a kernel comes up here."""
        if self.gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Gives memory back, after what held it is gone."""
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def turns(
        self, calls: Mapping[str, Callable[[], object]], warm_up: int = 3
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Times of calls that take turns, A B C A B C ..., and the reasons of those that failed.

        The host does not wait between them: it runs ahead of the device, as it does in training, and what is timed is
        the device's work unless a call makes the device wait for the host.
        """
        reasons: dict[str, str] = {}
        times: dict[str, list[Any]] = {name: [] for name in calls}
        for turn in range(-warm_up, self.rounds):
            for name, call in calls.items():
                if name in reasons:
                    continue
                try:
                    took = self._one(call)
                    if turn < 0:
                        self.wait()
                    else:
                        times[name].append(took)
                except Exception as error:
                    reasons[name] = reason(error)
                    self.release()
        self.wait()
        timings = {
            name: Timing.of([self._seconds(took) for took in all_of])
            for name, all_of in times.items()
            if name not in reasons
        }
        return timings, reasons

    def _one(self, call: Callable[[], object]) -> Any:
        if self.flushed is None:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        self.flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return begin, end

    @staticmethod
    def _seconds(took: Any) -> float:
        return took if isinstance(took, float) else took[0].elapsed_time(took[1]) / 1e3

    def ceilings(self, matmul: int, copied_bytes: int, dtype: torch.dtype) -> Ceilings:
        """What a large product and a plain copy reach on this device now."""
        device = "cuda" if self.gpu else "cpu"
        # random: products of zeros run faster than those of data
        a, b = (torch.randn(matmul, matmul, device=device, dtype=dtype) for _ in range(2))
        x = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        timings, reasons = self.turns({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)})
        if reasons:
            raise RuntimeError(f"no ceilings: {reasons}")
        return Ceilings(
            2 * matmul**3 / timings["matmul"].seconds, 2 * copied_bytes / timings["copy"].seconds
        )


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def race(
    contenders: list[Contender], clock: Clock, ceilings: Ceilings, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each contender: its times and its floor, or the reason why there are none."""
    rows, calls = {}, {}
    for contender in contenders:
        row = {**common, **contender.row}
        name = " ".join(str(value) for value in key(row) if value is not None)
        rows[name] = row
        clock.say(f"{name}: is it right?")
        try:
            row["checked"] = contender.check()
            calls[name] = contender.call
        except Exception as error:
            row["reason"] = reason(error)
            clock.say(row["reason"])
        clock.release()
    timings, reasons = clock.turns(calls)
    for (name, row), contender in zip(rows.items(), contenders, strict=True):
        if name in timings:
            row |= timings[name]._asdict()
            row |= {**contender.work._asdict(), "floor": contender.work.floor(ceilings)}
            clock.say(f"{name}: {1e3 * row['seconds']:.3f} ms, floor {1e3 * row['floor']:.3f} ms")
        elif name in reasons:
            row["reason"] = reasons[name]
            clock.say(f"{name}: {reasons[name]}")
    clock.release()
    return list(rows.values())
