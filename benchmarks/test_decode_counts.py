"""Torch ops, Python calls and argument checks of one decoded token through one layer."""

from __future__ import annotations

import pytest
from measuring.counts import Counts, count, decode_step

import hamblocks as hb

TIMED_ROUNDS = 21


@pytest.mark.parametrize("conv_size", [1, 2])
@pytest.mark.parametrize("reserved", [True, False], ids=["reserved", "not reserved"])
def test_what_one_decoded_token_takes(benchmark, reserved, conv_size):
    step = decode_step(reserved, hb.SelectedAttention(conv_size=conv_size))
    counts = count(step)
    benchmark.extra_info.update(counts._asdict())
    benchmark.pedantic(step, rounds=TIMED_ROUNDS)
    state = "reserved" if reserved else "not reserved"
    case = f"state {state}, keys with {conv_size} taps"
    print(table(case, counts, benchmark.stats.stats.min))


def table(case: str, counts: Counts, seconds: float) -> str:
    """One line per count, and the fastest time of one token."""
    lines = [f"one token of 2 sequences through one layer, {case}"]
    lines += [
        f"  {name.replace('_', ' '):<16}{number:>8,}" for name, number in counts._asdict().items()
    ]
    return "\n".join([*lines, f"  {'microseconds':<16}{1e6 * seconds:>8,.0f}"])
