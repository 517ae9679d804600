"""Alignment: the new parts of a converted model learn what full attention gave, layer by layer.

The model is its own teacher. A converted model holds the weights of attention unchanged, so full
attention over all tokens gives the input and the output of every layer of the source. Each hybrid
layer is then fitted to its own pair, apart from all others: layers run in parallel, and no gradient
crosses a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.models.conversion import start_projections
from hamblocks.models.students import (
    AlignmentSettings,
    Progress,
    Run,
    Student,
    threads,
)
from hamblocks.models.teacher import full_attention, half_life, key_moments

STATE = "alignment.pt"


class Alignment(NamedTuple):
    """What an alignment did.

    Attributes:
        before: error of every aligned layer by keep fraction, before the first step: the squared
            error of the layer's output over the variance of what full attention gave, channels
            weighed as in the norm that reads them next.
        after: the same after the last step.
        seconds: time of the steps, over all runs.
        layers: indices of the aligned layers.
    """

    before: dict[str, list[float]]
    after: dict[str, list[float]]
    seconds: float
    layers: list[int]


def align(
    model: nn.Module,
    ids: Tensor,
    settings: AlignmentSettings | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Aligns the new parts of a converted model with full attention, in place.

    The first step starts from statistics of the teacher (`start_from_teacher`). Weights of the
    source do not change.

    Args:
        model: a model of `convert`.
        ids: int `[T]`, the tokens of a text.
        settings: how; None: the defaults.
        folder: where the state is saved, and where a run that stopped goes on; None: nowhere.
        progress: called after every step as `progress(name, done, total, remark)`.

    Raises:
        ValueError: the model has no hybrid layer or is not a converted one, layers share a
            threshold, the text is too short, or the state in `folder` is of another run.
    """
    settings = AlignmentSettings() if settings is None else settings
    run = _Aligning(model, ids, settings)
    with threads(settings.workers), ThreadPoolExecutor(settings.workers) as run.pool:
        after = run.carry_out("align", None if folder is None else folder / STATE, progress)
    return Alignment(run.before, after, run.seconds, list(run.students))


@torch.no_grad()
def start_from_teacher(layer: HAMLayer, x: Tensor) -> None:
    """Starts a layer's memory from statistics of its full attention, instead of from noise.

    - The decay of a head: half of the state is left after the distance within which half of the
      attention of the head to far tokens lies.
    - Projections of the memory's own start from those of attention. Keys are multiplied by the
      inverse root of their second moment, and queries too, so that unit keys spread in all
      directions: keys of attention share a large mean, which a delta rule would take for a match.

    A memory with other sizes than attention keeps its own start.

    Args:
        layer: a hybrid layer.
        x: `[B, T, hidden]`, normed inputs of the layer.
    """
    memory: Any = layer.memory
    heads = layer.dims.num_heads
    if isinstance(memory, GatedDeltaMemory) and layer.dims.memory_read[0] == heads:
        step = math.log(2) / (half_life(layer, x).to(memory.A_log) * memory.A_log.exp())
        memory.dt_bias.copy_(step + (-torch.expm1(-step)).log())
        memory.a_proj.weight.zero_()
    start_projections(layer, _inverse_root(key_moments(layer, x)))


def _inverse_root(moment: Tensor) -> Tensor:
    """The inverse square root of symmetric matrices `[H, D, D]`, with a floor for small directions."""
    values, vectors = torch.linalg.eigh(moment.double())
    floor = 1e-3 * values[:, -1:]
    scale = (values + floor).rsqrt()
    root: Tensor = (vectors * scale[:, None]) @ vectors.mT
    return root


class _Aligning(Run):
    """The steps of an alignment."""

    pool: ThreadPoolExecutor

    def start(self) -> None:
        """Starts every layer from statistics of the teacher, and measures its error."""

        def begin(student: Student, x: Tensor, _: Tensor) -> float:
            student.calibrate(x)
            return 0.0

        self._each(self.windows.of_step(0), begin)
        self.before = self.errors()

        def fit(student: Student, x: Tensor, _: Tensor) -> float:
            start_from_teacher(student.layer, x)
            student.calibrate(x)
            return 0.0

        self._each(self.windows.of_step(0), fit)

    def fit(self, ids: Tensor, fraction: float, rate: float) -> float:
        """One step of every layer; their mean error before it."""

        def fit(student: Student, x: Tensor, y: Tensor) -> float:
            return student.step(x, y, fraction, rate)

        errors: list[float] = self._each(ids, fit)
        return sum(errors) / len(errors)

    def errors(self) -> dict[str, list[float]]:
        """The error of every layer on the held-out windows, by keep fraction."""
        fractions = self.settings.fractions
        sums = torch.zeros(len(fractions), len(self.students))
        for window in self.windows.held:
            measured = self._each(window[None], self._measured)
            sums += torch.tensor(measured).T
        means = (sums / len(self.windows.held)).tolist()
        return {f"{fraction:g}": row for fraction, row in zip(fractions, means, strict=True)}

    @torch.no_grad()
    def _measured(self, student: Student, x: Tensor, y: Tensor) -> list[float]:
        student.layer.eval()
        return [float(student.error(x, y, fraction)) for fraction in self.settings.fractions]

    def _each(self, ids: Tensor, call: Callable[[Student, Tensor, Tensor], Any]) -> list[Any]:
        """Calls `call(student, x, y)` for every layer, while the teacher runs ahead."""
        tasks = [
            self.pool.submit(call, self.students[taught.layer], taught.x, taught.y)
            for taught in full_attention(self.model, ids)
            if taught.layer in self.students
        ]
        return [task.result() for task in tasks]
