"""The base of controllers that place a threshold among the scores seen in training."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hamblocks.controllers.drawn import NO_SCORE, drawn, keys_of, scores_of
from hamblocks.controllers.quantiles import LARGEST, ordered
from hamblocks.controllers.ranks import over_ranks
from hamblocks.controllers.tau import HasTau, float32
from hamblocks.heads import shared_call

SAMPLE_SIZE = 4096
"""Scores that a controller remembers: enough to place a quantile within 0.01."""

SAMPLE_STEPS = 8
"""Training steps that the remembered scores span: one batch may be unlike the rest of the text."""

REMIND_AFTER = 100
"""Forwards in training mode without a step after which a controller warns."""


class SampledThreshold(HasTau):
    """A threshold among the scores seen in training. A subclass says where, in `_move`.

    Every call in training mode adds to two counts, the scores and those that reach tau, and to a
    sample of the scores. `step()` reduces all three over the ranks, adds the sample to that of the
    last steps, and moves tau. Counts and sample depend on the scores of the step alone: the same
    batch gives the same tau on any number of ranks and in any number of forward passes, bit for
    bit, if no batch row is split.

    Tau, the sample and the buffers of a subclass are saved. They are float32, and averages of them
    are meaningful: the sample is saved as quantiles of each step, and averages of the quantiles of
    two distributions are quantiles of a distribution between them. Counts are plain attributes and
    are not saved: save a model between a step and the next forward pass.
    """

    quantiles: Tensor
    sampled: Tensor
    frozen: Tensor

    _scratch = ("seen", "admitted", "asked", "batch_sample")
    seen: Tensor
    """Scores counted since the last step, int64 `[]`."""
    admitted: Tensor
    """Those of them that reached tau, int64 `[]`."""
    asked: Tensor
    """1 after `set_fraction`, until a step places tau anew, int64 `[]`."""
    batch_sample: Tensor
    """A sample of the scores counted since the last step, int64 `[SAMPLE_SIZE]` (see `drawn`)."""

    _unstepped: int | None = 0
    """Forwards in training mode so far; None once a step came or the warning was given."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__(
            -math.inf,
            quantiles=torch.zeros(SAMPLE_STEPS, SAMPLE_SIZE // SAMPLE_STEPS, dtype=torch.float32),
            sampled=float32(0),
            frozen=float32(0),
            **buffers,
        )
        self._count_anew(torch.device("cpu"))

    @property
    def ignores_score(self) -> bool:
        """True in eval mode: scores are not counted, so padding needs no mask."""
        return not self.training

    @property
    def sample(self) -> Tensor:
        """Scores of the last training steps, float32 `[SAMPLE_SIZE]`; NaN before the first step."""
        return (self.quantiles / self.sampled).flatten()

    @property
    def started(self) -> Tensor:
        """Whether a step has seen a score, bool `[]`."""
        return self.sampled > 0

    @torch.no_grad()
    def reset(self) -> None:
        """Sets everything to what it was when the controller was made: no score was seen."""
        self._place(float32(-math.inf))
        for buffer in (self.quantiles, self.sampled, self.frozen):
            buffer.zero_()
        self._count_anew(self.sampled.device)

    @torch.no_grad()
    def freeze(self) -> None:
        """From now on no step moves tau. `set_fraction` and `set_threshold` still do.

        Raises:
            ValueError: the buffers are offloaded.
        """
        self._check_in_memory()
        self.frozen.fill_(1)

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Steps move tau again.

        Raises:
            ValueError: the buffers are offloaded.
        """
        self._check_in_memory()
        self.frozen.zero_()

    def forward(self, score: Tensor) -> Tensor:
        """Returns tau, float32 `[]`; in training mode it also counts the score `[B, T, H]`.

        A score of NaN stands for no token and is not counted.
        """
        tau = self.tau
        if self.training and score.numel():
            self._remind()
            self._count(score.detach(), tau)
        return tau

    @torch.no_grad()
    def _count(self, score: Tensor, tau: Tensor) -> None:
        self._move_scratch(score.device)
        call = shared_call()
        rank, ranks = (0, 1) if call is None else (call.share.rank, call.share.ranks)
        if call is not None and call.one_score:
            if rank > 0:  # the first rank counts the score that all of them have
                return
            ranks = 1
        self.seen.add_((~score.isnan()).sum())
        self.admitted.add_((score >= tau).sum() * (tau < math.inf))
        keys = torch.cat([self.batch_sample, keys_of(score, rank, ranks)])
        self.batch_sample.copy_(drawn(keys, SAMPLE_SIZE))

    def _remind(self) -> None:
        """Warns once if forwards in training mode are never followed by a step.

        The count is a Python number: it costs no buffer and no wait for the device. Compiled code
        does not count: it would be compiled anew for every number.
        """
        if torch.compiler.is_compiling() or self._unstepped is None:
            return
        self._unstepped += 1
        if self._unstepped >= REMIND_AFTER:
            self._unstepped = None
            warnings.warn(
                f"{type(self).__name__}: {REMIND_AFTER} forwards in training mode and no step, so "
                "its threshold never moves. Call hamblocks.step_controllers(model) after every "
                "optimizer.step(), or hamblocks.hook_controllers(optimizer, model) once.",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self) -> None:
        """Moves tau by the counts since the last step, over all ranks, and resets the counts.

        Every rank of a process group must call it. In eval mode nothing moves, and tau does not
        move if nothing was counted. On the meta device there is nothing to move.

        Raises:
            ValueError: scores were counted, and the buffers are offloaded.
        """
        if not self.training:
            return
        if not self.seen.is_meta:
            self._check_in_memory()
        self._unstepped = None
        self._keep_float32()
        self._move_scratch(self.sampled.device)
        counts = torch.stack([self.admitted, self.seen, self.asked])
        counts, keys = over_ranks(counts, self.batch_sample)
        admitted, seen, asked = counts.unbind()
        counted = seen > 0
        self.admitted.zero_()
        self.seen.zero_()
        self._remember(scores_of(keys), counted)
        self.batch_sample.fill_(NO_SCORE)
        self._move(admitted.double() / seen.clamp(min=1), counted, asked > 0)
        self.asked.mul_(~counted)

    def _remember(self, scores: Tensor, counted: Tensor) -> None:
        """Adds the sample of this step to the saved ones, in place of the oldest."""
        scores = ordered(scores).clamp(-LARGEST, LARGEST).float()
        every = scores.view(-1, SAMPLE_STEPS).T
        rows = torch.where(self.started, self.quantiles / self.sampled, 0)
        later = torch.cat([scores[None, SAMPLE_STEPS // 2 :: SAMPLE_STEPS], rows[:-1]])
        self.quantiles.copy_(torch.where(counted, torch.where(self.started, later, every), rows))
        self.sampled.copy_(counted | self.started)

    @abstractmethod
    def _move(self, share: Tensor, counted: Tensor, asked: Tensor) -> None:
        """Moves tau, where `counted` holds and the controller is not frozen.

        Args:
            share: float64 `[]`, the share of this step's scores that reached tau.
            counted: bool `[]`, whether this step has scores.
            asked: bool `[]`, whether `set_fraction` was called since the last step.
        """

    @abstractmethod
    def set_fraction(self, fraction: float) -> None:
        """Sets the tau in use to the one that a fraction of the sample reaches."""

    def _may_move(self, counted: Tensor) -> Tensor:
        return counted & (self.frozen < 0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves buffers and counts between devices, but casts none of them."""
        super()._apply(fn, recurse)
        self._move_scratch(self.sampled.device)
        return self

    def _move_scratch(self, device: torch.device) -> None:
        """Moves the counts to a device; from and to the meta device they are reset."""
        if self.seen.device == device:
            return
        if self.seen.is_meta or device.type == "meta":
            self._count_anew(device)
            return
        for name in self._scratch:
            setattr(self, name, getattr(self, name).to(device))

    def _count_anew(self, device: torch.device) -> None:
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.admitted = torch.zeros((), dtype=torch.int64, device=device)
        self.asked = torch.zeros((), dtype=torch.int64, device=device)
        self.batch_sample = torch.full((SAMPLE_SIZE,), NO_SCORE, device=device)
