"""Times this tree against another revision, in turns, and fails where this tree is slower.

    python benchmarks/compare.py BASE [--only TEXT] [--rounds N]

Both trees run `benchmarks/cases.py` of this tree, each in a process of its own; one of them works
at a time. A round times both, in an order that alternates. A case is slower if the 95 % interval of
the median of its ratios lies above 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = 1.05
"""Ratio of times above which a case is slower."""
LEAST = 0.05
"""Seconds that a timing takes at least: short calls are repeated."""


class Ratio(NamedTuple):
    """Time of this tree over that of the other one: median of the rounds, and a 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def is_slower(self) -> bool:
        """Whether this tree is slower by more than the noise and 5 %."""
        return self.low > ALLOWED


def ratio_of(own: Sequence[float], base: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio of paired times, with a bootstrap interval of its median.

    Args:
        own: seconds of this tree, a number per round.
        base: seconds of the other tree in the same rounds.
        seed: of the bootstrap.
    """
    ratios = [x / y for x, y in zip(own, base, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(statistics.median(ratios), medians[50], medians[-51])


class Worker:
    """A process that runs cases with the library of one tree."""

    def __init__(self, tree: Path, small: bool) -> None:
        paths = [str(tree), str(tree / "ops"), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, __file__, "--worker", *(["--small"] if small else [])]
        self.tree = tree
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=environment,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.tree} has ended")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def work(small: bool) -> None:
    """Answers requests: the names of the cases, a case to begin, calls to time."""
    import torch
    from cases import cases  # of the folder of this file, whatever the tree

    answers, sys.stdout = sys.stdout, sys.stderr
    table, case = cases(small), None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["what"] == "names":
            answer = list(table)
        elif request["what"] == "begin":
            torch.manual_seed(0)
            try:
                case = table[request["name"]]()
                case.check()
                case.call()
                began = time.perf_counter()
                case.call()
                once = time.perf_counter() - began
                answer = {"calls": max(1, round(LEAST / once))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        else:
            assert case is not None
            began = time.perf_counter()
            for _ in range(request["calls"]):
                case.call()
            answer = (time.perf_counter() - began) / request["calls"]
        print(json.dumps(answer), file=answers, flush=True)


def compare(own: Worker, base: Worker, name: str, rounds: int) -> Ratio | str:
    """The ratio of a case, or why it cannot be timed."""
    begun = [worker.ask(what="begin", name=name) for worker in (own, base)]
    for whose, answer in zip(("this tree", "the base"), begun, strict=True):
        if "error" in answer:
            return f"{whose}: {answer['error']}"
    calls = min(answer["calls"] for answer in begun)
    times: dict[Worker, list[float]] = {own: [], base: []}
    for number in range(rounds):
        order = (own, base) if number % 2 else (base, own)
        for worker in order:
            times[worker].append(worker.ask(what="time", calls=calls))
    return ratio_of(times[own], times[base])


def run(base: Path, only: str, rounds: int, small: bool) -> list[str]:
    """Compares all cases, prints a line for each, and returns what failed."""
    workers = Worker(ROOT, small), Worker(base, small)
    failed = []
    try:
        names = [name for name in workers[0].ask(what="names") if only in name]
        if not names:
            raise SystemExit(f"--only: expected a part of a name, got {only!r}")
        print(f"{'time of this tree / base':52} median    95 % interval")
        for name in names:
            result = compare(*workers, name, rounds)
            if isinstance(result, str):
                # a base that lacks what a case needs is no failure of this tree
                print(f"{name:52} not timed ({result})")
                failed += [name] if result.startswith("this tree") else []
                continue
            verdict = "  SLOWER" if result.is_slower else ""
            print(
                f"{name:52} {result.median:6.3f}   [{result.low:.3f}, {result.high:.3f}]{verdict}"
            )
            failed += [name] if result.is_slower else []
    finally:
        for worker in workers:
            worker.close()
    return failed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="a revision of this repository, or a folder")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the command")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.small)
        return
    if given.base is None:
        parser.error("base: expected a revision or a folder")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(given.base)
        is_revision = not base.is_dir()
        if is_revision:
            base = Path(folder) / "base"
            add = ["git", "worktree", "add", "--quiet", "--detach", str(base), given.base]
            subprocess.run(add, cwd=ROOT, check=True)
        try:
            failed = run(base.resolve(), given.only, given.rounds, given.small)
        finally:
            if is_revision:
                remove = ["git", "worktree", "remove", "--force", str(base)]
                subprocess.run(remove, cwd=ROOT, check=True)
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
