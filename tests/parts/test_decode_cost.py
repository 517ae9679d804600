"""One decoded token costs no more torch ops, Python calls and argument checks than it used to."""

from __future__ import annotations

from pathlib import Path

import pytest

import hamblocks as hb

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ATTENTION = {
    "no convolution": lambda: hb.SelectedAttention(conv_size=1),
    "as it comes": hb.SelectedAttention,
}

# Measured by this test on 2026-11-29, Python 3.11, torch 2.13.0, CPU. These bounds only go down:
# whoever makes decoding cheaper lowers them, and nobody raises them.
MOST = {
    ("no convolution", "reserved"): {"torch_ops": 192, "our_calls": 355, "argument_checks": 4},
    ("no convolution", "not reserved"): {"torch_ops": 192, "our_calls": 353, "argument_checks": 4},
    ("as it comes", "reserved"): {"torch_ops": 199, "our_calls": 360, "argument_checks": 4},
    ("as it comes", "not reserved"): {"torch_ops": 199, "our_calls": 358, "argument_checks": 4},
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Takes the place of the fixture of the whole suite, whose own calls would be counted too."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The folder of the benchmarks, as when one of its scripts runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(("attention", "state"), MOST)
def test_a_decoded_token_costs_no_more_than_before(attention, state):
    from measuring.counts import count, decode_step

    step = decode_step(state == "reserved", ATTENTION[attention]())
    bounds, counts = MOST[attention, state], count(step)._asdict()
    more = {name: counts[name] for name, most in bounds.items() if counts[name] > most}
    assert more == {}, f"{attention}, {state}: at most {bounds}"


def test_counts_by_hand():
    import torch
    from measuring.counts import Counts, count

    from hamblocks_ops.arguments import check_integer

    x = torch.zeros(2, dtype=torch.int32)

    def inner():
        return x + 1

    def call():
        # two ops, one check, and three Python calls with this one
        check_integer("x", x)
        inner().neg_()

    assert count(call) == Counts(torch_ops=2, our_calls=1, python_calls=3, argument_checks=1)
