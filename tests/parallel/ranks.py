"""Processes of one machine that form a process group and run functions of tests together."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4
TIMEOUT = 300


def _main(rank: int, store: Path, pipe: Any, timeout: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=timeout),
    )
    # every rank makes every group
    groups = {1: [dist.new_group([one]) for one in range(RANKS)][rank]}
    groups[2] = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    groups[4] = None
    while True:
        function, ranks, args = pipe.recv()
        try:
            pipe.send((True, function(groups[ranks], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return  # the others wait for this rank in a collective: it leaves, and they fail


def _answer(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer")
    except EOFError:
        return False, "the process has ended"


class Workers:
    """Four processes; they stay, because importing torch takes longer than most tests."""

    def __init__(self, folder: Path, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        self.answers: list[tuple[bool, Any]] = []
        for rank in range(RANKS):
            own, other = context.Pipe()
            process = context.Process(
                target=_main, args=(rank, folder / "store", other, timeout), daemon=True
            )
            process.start()
            other.close()  # so that the end of the process closes the pipe
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
        """Calls `function(group, *args)` in every process, in groups of 1, 2 or 4 ranks.

        Raises:
            AssertionError: it raised in one of them.
        """
        for pipe in self.pipes:
            pipe.send((function, ranks, args))
        self.answers = [_answer(pipe) for pipe in self.pipes]
        failed = [
            f"rank {rank}: {text}" for rank, (fine, text) in enumerate(self.answers) if not fine
        ]
        if failed:
            self.close()  # the others may still be on their way to a collective
        assert not failed, "\n".join(failed)
        return [result for _, result in self.answers]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
