"""Torch ops, Python calls and argument checks of one decoded token through one layer."""

from __future__ import annotations

import pytest
from measuring.counts import Counts, count, decode_step

TIMED_ROUNDS = 21


@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "not reserved"])
def test_what_one_decoded_token_takes(benchmark, reserved):
    step = decode_step(reserved)
    counts = count(step)
    benchmark.extra_info.update(counts._asdict())
    benchmark.pedantic(step, rounds=TIMED_ROUNDS)
    state = "reserved" if reserved else "not reserved"
    print(table(state, counts, benchmark.stats.stats.min))


def table(state: str, counts: Counts, seconds: float) -> str:
    """One line per count, and the fastest time of one token."""
    lines = [f"one token of 2 sequences through one layer, state {state}"]
    lines += [
        f"  {name.replace('_', ' '):<16}{number:>8,}" for name, number in counts._asdict().items()
    ]
    return "\n".join([*lines, f"  {'microseconds':<16}{1e6 * seconds:>8,.0f}"])
