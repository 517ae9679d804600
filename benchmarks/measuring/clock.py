"""Times calls that take turns on one device. A call is timed only after its check."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from measuring.chips import Chip, chip_of
from measuring.costs import costs
from measuring.estimates import Estimate
from measuring.floors import Ceilings, Work
from measuring.targets import key

FLUSHED_BYTES = 2**28
"""Bytes that are zeroed before each call: several times any L2, so that no inputs stay there."""
WARM_UP_ROUNDS = 3
MAX_REASON_CHARACTERS = 400


class NotHereError(Exception):
    """This machine lacks what a baseline needs."""


class OutOfTimeError(Exception):
    """The part has used up its time, and the rest of it is not measured."""


class Contender(NamedTuple):
    """One of the calls that are compared.

    Attributes:
        names: its case, and whatever else distinguishes its measurement from others.
        call: what is timed.
        check: returns a record of what was compared; raises if a result is wrong.
        work: the least that the call has to do.
        estimate: what it should take; None where nothing is estimated, as on a CPU.
    """

    names: dict[str, Any]
    call: Callable[[], object]
    check: Callable[[], dict[str, Any]]
    work: Work
    estimate: Estimate | None = None


class Timing(NamedTuple):
    """Median over rounds and the quartiles, and the median time of the host, in seconds.

    On a GPU the host's time is that until the call returns, while the device still works.
    """

    seconds: float
    lower: float
    upper: float
    host_seconds: float

    @classmethod
    def of(cls, times: list[float], host: list[float]) -> Timing:
        """Takes the times of two rounds or more."""
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, lower, upper, statistics.median(host))


class Clock:
    """Times calls on a device and prints progress.

    Attributes:
        until: when the part that is measured has to end, as `time.perf_counter` counts.
        chip: the GPU as estimates know it; None on a CPU, and for a GPU without public times.
    """

    def __init__(self, device: str, rounds: int) -> None:
        self.gpu, self.rounds, self.began = device == "cuda", rounds, time.perf_counter()
        self.until = float("inf")
        self.chip: Chip | None = chip_of(device)
        self.flushed = (
            torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if self.gpu else None
        )

    def say(self, text: str) -> None:
        """Prints a line of progress, with the seconds since the start."""
        print(f"{time.perf_counter() - self.began:6.0f} s  {text}", flush=True)

    def in_time(self) -> None:
        """Raises OutOfTimeError once the part that is measured has used up its time."""
        if time.perf_counter() > self.until:
            raise OutOfTimeError("the time of this part is over")

    def wait(self) -> None:
        """Waits until the device is idle. An error of a kernel is raised here."""
        if self.gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Frees cached memory of the device."""
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def turns(
        self, calls: Mapping[str, Callable[[], object]], warm_up: int = WARM_UP_ROUNDS
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Runs calls in turns, A B C A B C ..., and returns their times, or why they failed.

        The host does not wait between calls. It runs ahead of the device, as in training, so that
        the times are those of the device unless a call makes the device wait for the host.
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
            name: Timing.of(
                [self._seconds(took) for took, _ in all_of], [host for _, host in all_of]
            )
            for name, all_of in times.items()
            if name not in reasons
        }
        return timings, reasons

    def _one(self, call: Callable[[], object]) -> tuple[Any, float]:
        """Time on the device, a pair of events on a GPU, and time of the host."""
        if self.flushed is None:
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            return took, took
        self.flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        end.record()
        return (begin, end), host

    @staticmethod
    def _seconds(took: Any) -> float:
        return took if isinstance(took, float) else took[0].elapsed_time(took[1]) / 1e3

    def ceilings(self, matmul: int, copied_bytes: int, dtype: torch.dtype) -> Ceilings:
        """Measures the rates of a large product and of a plain copy on this device."""
        device = "cuda" if self.gpu else "cpu"
        # random, because products of zeros run faster
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
    """Describes an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON_CHARACTERS]}"


def beside(seconds: float, estimate: Estimate | None) -> dict[str, Any]:
    """What is written of an estimate beside a measured time; nothing if there is none."""
    if estimate is None:
        return {}
    return estimate.record() | {"of_estimate": seconds / estimate.seconds}


def race(
    contenders: list[Contender], clock: Clock, ceilings: Ceilings, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a measurement per contender: time, floor and estimate, or why there are none."""
    measured = {}
    calls = {}
    for contender in contenders:
        one = {**common, **contender.names}
        name = " ".join(str(value) for value in key(one) if value is not None)
        measured[name] = one
        clock.say(f"{name}: checking")
        try:
            clock.in_time()
            one["checked"] = contender.check()
            one |= costs(contender.call, clock.gpu)
            calls[name] = contender.call
        except Exception as error:
            one["reason"] = reason(error)
            clock.say(one["reason"])
        clock.release()
    timings, reasons = clock.turns(calls)
    for (name, one), contender in zip(measured.items(), contenders, strict=True):
        if name in timings:
            one |= timings[name]._asdict()
            one |= {**contender.work._asdict(), "floor": contender.work.floor(ceilings)}
            one |= beside(one["seconds"], contender.estimate)
            clock.say(f"{name}: {1e3 * one['seconds']:.3f} ms, floor {1e3 * one['floor']:.3f} ms")
        elif name in reasons:
            one["reason"] = reasons[name]
            clock.say(f"{name}: {reasons[name]}")
    clock.release()
    return list(measured.values())
