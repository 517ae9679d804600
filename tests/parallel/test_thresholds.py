"""Thresholds on several ranks: equal on all, and those of one process, to the last bit."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Workers

import hamblocks as hb

MAKERS = {
    "target": lambda: hb.TargetFraction(0.3),
    "annealed": lambda: hb.AnnealedFraction(0.2, 6),
    "elastic": lambda: hb.ElasticFraction(0.1),
}
STEPS = 6
GROUP_TIMEOUT, LATE = 8, 16  # seconds


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(8, 900, 2, generator=generator).exp().round(decimals=2) + 0.1 * step
        for step in range(STEPS)
    ]


def taus_of(name: str, parts: list[list[torch.Tensor]]) -> list[float]:
    controller, taus = MAKERS[name](), []
    for forwards in parts:
        for score in forwards:
            controller(score)
        controller.step()
        taus.append(controller.tau.item())
    return taus


def on_ranks(group: Any, name: str, accumulated: int) -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = [score.chunk(ranks)[rank] for score in batches()]
    return taus_of(name, [list(score.chunk(accumulated)) for score in own])


@pytest.mark.parametrize("name", MAKERS)
def test_ranks_and_forwards_do_not_change_the_threshold(workers, name):
    alone = taus_of(name, [[score] for score in batches()])
    assert len(set(alone)) > 2
    assert taus_of(name, [list(score.chunk(8)) for score in batches()]) == alone
    for accumulated in (1, 2):
        assert workers.run(on_ranks, 4, name, accumulated) == [alone] * 4


def steps_but_for_one(_: Any) -> str:
    layer = hb.HAMLayer(8, 1, selector=hb.Threshold(hb.TargetFraction(0.5)))
    layer(torch.randn(1, 4, 8))
    if dist.get_rank() == 2:
        time.sleep(LATE)  # a rank that ended would be an error at once
        return "late"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="step_controllers: expected a call on each of the 4"):
        hb.step_controllers(layer)
    assert time.monotonic() - begin < LATE
    return "ended"


@pytest.mark.slow
def test_a_step_on_some_ranks_ends_by_the_timeout_of_the_group(tmp_path):
    workers = Workers(tmp_path, timeout=GROUP_TIMEOUT)
    try:
        found = workers.run(steps_but_for_one, 4)
    finally:
        workers.close()
    assert found == ["ended", "ended", "late", "ended"]


def steps_but_one_dies(_: Any) -> None:
    layer = hb.HAMLayer(8, 1, selector=hb.Threshold(hb.TargetFraction(0.5)))
    layer(torch.randn(1, 4, 8))
    if dist.get_rank() == 2:
        os._exit(1)
    begin = time.monotonic()
    try:
        hb.step_controllers(layer)
    finally:  # an uncaught error ends the process, and so the next one
        assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_rank_that_ends_before_a_step_ends_the_others(tmp_path):
    workers = Workers(tmp_path)
    try:
        with pytest.raises((AssertionError, ConnectionError)):
            workers.run(steps_but_one_dies, 4)
        named = "RuntimeError: step_controllers: expected a call on each of the 4 ranks"
        assert sum(named in text for _, text in workers.answers) == 3
    finally:
        workers.close()
