"""Thresholds on several ranks: equal on all, and those of one process, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import hamblocks as hb

MAKERS = {
    "target": lambda: hb.TargetFraction(0.3),
    "annealed": lambda: hb.AnnealedFraction(0.2, 6),
    "elastic": lambda: hb.ElasticFraction(0.1),
}
STEPS = 6


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
