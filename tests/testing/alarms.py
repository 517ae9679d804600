"""How often checks reject sound parts: the ci profile over all of them under 20 seeds.

Run by `make alarms`.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

SEEDS = 20


def checks() -> list[Any]:
    """Every check that draws cases, for every sound part."""
    import test_ours

    tests = [one for name, one in vars(test_ours).items() if name.startswith("test_")]
    bound = [case.values[0] for test in tests for case in test.pytestmark[0].args[1]]
    return [one for one in bound if one.check.cases is not None or one.check.kind == "op"]


def under(seed: int) -> tuple[int, int, list[str]]:
    """Runs all checks with a seed: the seed, how many checks ran, and the failures."""
    torch.set_num_threads(1)
    failed = []
    for one in checks():
        try:
            one.check(
                one.part,
                options=one.options,
                profile="ci",
                seed=seed,
                shrink=False,
                edges=False,
                called=one.called,
            )
        except AssertionError as error:
            failed.append(str(error))
    return seed, len(checks()), failed


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    begin, alarms = time.perf_counter(), 0
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for seed, ran, failed in pool.imap_unordered(under, range(1, SEEDS + 1)):
            print(
                f"seed {seed}: {ran} checks, {len(failed)} failed, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            alarms += len(failed)
            for message in failed:
                print(message, flush=True)
    print(f"{alarms} false alarms under {SEEDS} seeds")
    sys.exit(alarms > 0)


if __name__ == "__main__":
    main()
