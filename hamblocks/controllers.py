"""Controllers: who sets the threshold."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

SAMPLE, STEPS = 4096, 8
"""Scores remembered of the last training steps, enough to place a quantile within 0.01, and how many steps they span:
one batch alone may be unlike the rest of the text."""


class _Tau(nn.Module):
    """A threshold that stays float32 whatever the model is cast to. All that it knows are buffers."""

    tau: Tensor

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand, at any time.

        Raises:
            ValueError: tau is NaN or no number.
        """
        self.tau.fill_(_number("tau", tau))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves buffers between devices, but casts none of them."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"tau={float(self.tau):g}" if self.tau.device.type == "cpu" else ""


@final
class FixedThreshold(_Tau):
    """A threshold set by the user: -inf stores everything, +inf nothing."""

    def __init__(self, tau: float) -> None:
        """Makes the controller.

        Raises:
            ValueError: tau is NaN or no number.
        """
        super().__init__(tau=_float32(_number("tau", tau)))
        self.initial_tau = float(tau)

    @torch.no_grad()
    def reset(self) -> None:
        """Tau as it was made."""
        self.tau.fill_(self.initial_tau)

    def forward(self, score: Tensor) -> Tensor:
        """Tau, float32 `[]`."""
        return self.tau

    def step(self) -> None:
        """Nothing to move."""


@final
class TargetFraction(_Tau):
    """Moves tau so that a fraction of tokens reaches it (arXiv 2603.22325).

    One step per optimizer step (see `step_controllers`), along the gradient of the pinball loss, whose minimum is the
    (1 - fraction) quantile of the scores:

        tau += rate * spread * (admitted / seen - fraction)

    The spread is a running average of the scores' interquartile range over that of a standard normal, so that the rate
    has no unit and a few huge scores do not make the step huge. tau starts at the (1 - fraction) quantile of the first
    step's scores; until then everything is stored. In eval mode nothing counts and nothing moves. The fraction is what
    its own threshold admits, whatever else a selector combines it with. One controller may serve several layers: its
    tau is then theirs together.
    """

    target: Tensor
    seen: Tensor
    admitted: Tensor
    spread: Tensor
    started: Tensor
    sample: Tensor
    turn: Tensor

    def __init__(self, fraction: float, *, rate: float = 1.0) -> None:
        """Makes the controller.

        Args:
            fraction: target, in [0, 1].
            rate: step size in units of the scores' spread, finite and >= 0; 0 freezes tau after its start.

        Raises:
            ValueError: a number is out of range.
        """
        if not 0 <= _number("fraction", fraction) <= 1:
            raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
        if not 0 <= _number("rate", rate) < math.inf:
            raise ValueError(f"rate: expected a finite number >= 0, got {rate}")
        super().__init__(
            tau=_float32(-math.inf),
            target=_float32(fraction),
            seen=torch.zeros((), dtype=torch.int64),
            admitted=torch.zeros((), dtype=torch.int64),
            spread=_float32(0),
            started=torch.zeros((), dtype=torch.bool),
            turn=torch.zeros((), dtype=torch.int64),
            sample=torch.full((SAMPLE,), math.nan, dtype=torch.float32),
        )
        self.rate = rate
        self.initial_fraction = float(fraction)

    @property
    def fraction(self) -> float:
        """The target, a buffer of float32: it is saved with the weights."""
        return shortest(self.target)

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self.target.fill_(fraction)

    @torch.no_grad()
    def reset(self) -> None:
        """All as it was made: nothing seen, nothing started."""
        self.tau.fill_(-math.inf)
        self.sample.fill_(math.nan)
        self.target.fill_(self.initial_fraction)
        for buffer in (self.seen, self.admitted, self.spread, self.started, self.turn):
            buffer.zero_()

    def forward(self, score: Tensor) -> Tensor:
        """Tau, float32 `[]`; in training mode it also counts score `[B, T, H]` (NaN: no token)."""
        if self.training and score.numel():
            with torch.no_grad():
                flat = score.detach().flatten()
                self.seen += (~flat.isnan()).sum()
                self.admitted += (flat >= self.tau).sum()
                place = torch.arange(SAMPLE, device=flat.device)
                # later steps replace their share; a second forward of the same step replaces it once more
                own = (place % STEPS == self.turn) | ~self.started
                self.sample.copy_(
                    torch.where(own, flat[place * flat.numel() // SAMPLE], self.sample)
                )
        return self.tau

    @torch.no_grad()
    def step(self) -> None:
        """Moves tau by what was counted since the last step, over all ranks, and starts counting anew.

        Every rank of a process group must call it. Nothing moves where nothing was counted, or in eval mode.
        """
        if not self.training:
            return
        counts = torch.stack([self.admitted, self.seen]).double()
        scores = self.sample
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            torch.distributed.all_reduce(counts)
            every = [torch.empty_like(scores) for _ in range(ranks)]
            torch.distributed.all_gather(every, scores)
            scores = torch.cat(every)
        spread = _spread(scores)
        self.admitted.zero_()
        self.seen.zero_()
        something = counts[1] > 0
        error = (counts[0] / counts[1].clamp(min=1) - self.target).float()
        first = something & ~self.started
        self.spread.copy_(
            torch.where(
                first, spread, torch.where(something, self.spread.lerp(spread, 0.1), self.spread)
            )
        )
        moved = torch.where(something, self.tau + self.rate * self.spread * error, self.tau)
        self.tau.copy_(torch.where(first, _quantile(scores, self.target), moved))
        self.started |= something
        self.turn.copy_((self.turn + something) % STEPS)

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand; training, if it goes on, moves it from there.

        Raises:
            ValueError: tau is NaN or no number.
        """
        super().set_threshold(tau)
        self.started.fill_(True)

    @torch.no_grad()
    def set_fraction(self, fraction: float) -> None:
        """Moves a trained model along the trade-off: a new target, and tau at its quantile of the scores of training.

        0 gives tau = +inf and 1 gives tau = -inf, exactly.

        Raises:
            ValueError: `fraction` is outside [0, 1], or no score was seen in training yet.
        """
        if not 0 <= _number("fraction", fraction) <= 1:
            raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
        if bool(self.sample.isnan().all()):
            raise ValueError(
                "fraction: expected a controller that saw scores in training, got one that saw none"
            )
        self.fraction = fraction
        self.tau.copy_(_quantile(self.sample, self.target))
        self.started.fill_(True)

    def extra_repr(self) -> str:
        """Target, rate and threshold."""
        tau = super().extra_repr()
        return f"{self.fraction:g}, rate={self.rate:g}, {tau}" if tau else f"rate={self.rate:g}"


def _quantile(scores: Tensor, fraction: Tensor) -> Tensor:
    """The threshold that `fraction` of the scores reach; NaN does not count."""
    return (
        _tame(scores)
        .nanquantile(1 - fraction)
        .where(fraction > 0, math.inf)
        .where(fraction < 1, -math.inf)
    )


def _spread(scores: Tensor) -> Tensor:
    """Interquartile range over that of a standard normal, the standard deviation where most scores are equal.

    NaN does not count, and of nothing it is 0.
    """
    scores = _tame(scores)
    low, high = scores.nanquantile(torch.tensor([0.25, 0.75], device=scores.device))
    deviation = (scores - scores.nanmean()).square().nanmean().sqrt()
    return torch.where(high > low, (high - low) / 1.349, deviation).nan_to_num(0.0)


def _tame(scores: Tensor) -> Tensor:
    """Infinite scores as large finite ones, between which a quantile is a number and whose squares have a mean."""
    return scores.clamp(-1e17, 1e17)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def shortest(value: Tensor) -> float:
    """The number with the fewest digits that is this float32 `[]`: 0.1, not 0.10000000149011612."""
    exact = float(value)
    for digits in range(6, 9):
        short = float(f"{exact:.{digits}g}")
        if struct.unpack("f", struct.pack("f", short))[0] == exact:
            return short
    return exact


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name}: expected a number that is not NaN, got {value!r}")
    return float(value)


def step_controllers(model: nn.Module) -> None:
    """Moves the thresholds of all controllers in a model: call it after every optimizer step.

    A controller is a submodule of a selector with a method `step`; one that several layers share is moved once.
    """
    seen: set[int] = set()
    for module in model.modules():
        controller = getattr(module, "controller", None)
        step = getattr(controller, "step", None)
        if callable(step) and id(controller) not in seen:
            seen.add(id(controller))
            step()


def hook_controllers(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Has every `optimizer.step()` call `step_controllers(model)`; returns the hook's handle, to `remove()` it."""
    return optimizer.register_step_post_hook(lambda *_: step_controllers(model))
