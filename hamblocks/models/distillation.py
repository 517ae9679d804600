"""Distillation: the new parts of a converted model learn the next-token predictions of the source.

Alignment fits every layer to the inputs that the source had. Distillation runs the model as it is
used, where a layer's input has the errors of the layers before, and fits the logits. The model is
its own teacher, as in alignment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.models.students import AlignmentSettings, Progress, Run, threads
from hamblocks.models.teacher import source_logits
from hamblocks_ops.arguments import wrong

STATE = "distillation.pt"


class Distillation(NamedTuple):
    """What a distillation did.

    Attributes:
        before: divergence of the model's predictions from those of the source in nats per token, by
            keep fraction, before the first step.
        after: the same after the last step.
        seconds: time of the steps, over all runs.
    """

    before: dict[str, list[float]]
    after: dict[str, list[float]]
    seconds: float


def distill(
    model: nn.Module,
    ids: Tensor,
    settings: AlignmentSettings | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Distils the predictions of the source into the new parts of a converted model, in place.

    The loss is the Kullback-Leibler divergence of the predictions for every token. Weights of the
    source do not change.

    Args:
        model: a `HAMForCausalLM` of `convert`, aligned or not.
        ids: as in `align`.
        settings: as in `align`; None: the defaults with lr = 0.003.
        folder: as in `align`.
        progress: as in `align`.

    Raises:
        ValueError: as in `align`.
    """
    settings = AlignmentSettings(lr=3e-3) if settings is None else settings
    if not hasattr(model, "lm_head"):
        raise wrong("model", "a HAMForCausalLM, from hamblocks.models.convert", model)
    run = _Distilling(model, ids, settings)
    with threads(1):
        after = run.carry_out("distill", None if folder is None else folder / STATE, progress)
    return Distillation(run.before, after, run.seconds)


class _Distilling(Run):
    """The steps of a distillation."""

    @torch.no_grad()
    def start(self) -> None:
        """Shows the thresholds the scores of a window, and measures the divergence."""
        for student in self.students.values():
            student.begin(1.0)
        self._logits(self.windows.of_step(0))
        for student in self.students.values():
            student.calibrated()
        self.before = self.errors()

    def fit(self, ids: Tensor, fraction: float, rate: float) -> float:
        """One step of all layers; the divergence before it."""
        for student in self.students.values():
            student.begin(fraction)
        with torch.enable_grad():
            divergence = self._divergence(ids)
            divergence.backward()
        for student in self.students.values():
            student.learn(rate)
        return float(divergence.detach())

    @torch.no_grad()
    def errors(self) -> dict[str, list[float]]:
        """The divergence on the held-out windows, by keep fraction."""
        found = {}
        for fraction in self.settings.fractions:
            for student in self.students.values():
                student.layer.eval()
                student.keep(fraction)
            windows = self.windows.held
            found[f"{fraction:g}"] = [float(self._divergence(window[None])) for window in windows]
        return found

    def _divergence(self, ids: Tensor) -> Tensor:
        expected = source_logits(self.model, ids).float().log_softmax(-1)
        got = self._logits(ids).float().log_softmax(-1)
        return F.kl_div(got[0], expected[0], reduction="batchmean", log_target=True)

    def _logits(self, ids: Tensor) -> Tensor:
        result: Any = self.model(ids, use_cache=False)
        logits: Tensor = result.logits
        return logits
