"""Controllers: they set and move the threshold that a score must reach to be stored."""

from __future__ import annotations

import math
import numbers
import struct
import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from hamblocks.reachable import model_controllers

SAMPLE_SIZE = 4096
"""Scores that a `TargetFraction` remembers: enough to place a quantile within 0.01."""

SAMPLE_STEPS = 8
"""Training steps that the remembered scores span: one batch may be unlike the rest of the text."""

REMIND_AFTER = 100
"""Forwards in training mode without a step after which a `TargetFraction` warns."""

FLOAT32_MAX = torch.finfo(torch.float32).max


class _Tau(nn.Module):
    """A threshold that stays float32 whatever the model is cast to. Its state is in buffers."""

    tau: Tensor

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand, at any time.

        Raises:
            ValueError: `tau` is NaN or no number.
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

        Args:
            tau: the threshold, any number but NaN.

        Raises:
            ValueError: `tau` is NaN or no number.
        """
        super().__init__(tau=_float32(_number("tau", tau)))
        self.initial_tau = float(tau)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets tau to the value that the controller was made with."""
        self.tau.fill_(self.initial_tau)

    def forward(self, score: Tensor) -> Tensor:
        """Returns tau, float32 `[]`, for any score."""
        return self.tau

    def step(self) -> None:
        """Does nothing: the threshold is fixed."""


@final
class TargetFraction(_Tau):
    """Moves tau so that a fraction of the tokens reaches it (arXiv 2603.22325).

    Every optimizer step moves tau once (see `step_controllers`), along the gradient of the pinball
    loss, whose minimum is the (1 - fraction) quantile of the scores:

        tau += rate * spread * (admitted / seen - fraction)

    `admitted` of the `seen` scores since the last step reached tau. The spread is a running average
    of the scores' interquartile range over that of a standard normal, so the rate has no unit and a
    few huge scores do not make the step huge.

    tau starts at -inf: until the first step everything is stored. A step that finds tau infinite
    places it by `threshold_between`, strictly between two scores, so that no decision depends on
    how the last bit of a score was rounded. So a target of 0 (tau = +inf) or 1 (tau = -inf) can be
    changed in training.

    In eval mode nothing is counted and nothing moves. The fraction is what this threshold admits,
    whatever a selector combines it with. One controller may serve several layers, which then have
    one tau for all of them.
    """

    target: Tensor
    seen: Tensor
    admitted: Tensor
    spread: Tensor
    started: Tensor
    sample: Tensor
    turn: Tensor

    _unstepped: int | None = 0
    """Forwards in training mode so far; None once a step came or the warning was given."""

    def __init__(self, fraction: float, *, rate: float = 1.0) -> None:
        """Makes the controller.

        Args:
            fraction: the target, in [0, 1].
            rate: step size in units of the scores' spread, finite and >= 0; with 0, tau stays where
                its first step places it.

        Raises:
            ValueError: a number is out of range.
        """
        if not 0 <= _number("rate", rate) < math.inf:
            raise ValueError(f"rate: expected a finite number >= 0, got {rate}")
        super().__init__(
            tau=_float32(-math.inf),
            target=_float32(_fraction(fraction)),
            seen=torch.zeros((), dtype=torch.int64),
            admitted=torch.zeros((), dtype=torch.int64),
            spread=_float32(0),
            started=torch.zeros((), dtype=torch.bool),
            turn=torch.zeros((), dtype=torch.int64),
            sample=torch.full((SAMPLE_SIZE,), math.nan, dtype=torch.float32),
        )
        self.rate = float(rate)
        self.initial_fraction = float(fraction)

    @property
    def fraction(self) -> float:
        """The target. It is a float32 buffer, so it is saved with the weights."""
        return shortest(self.target)

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self.target.fill_(fraction)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets everything to what it was when the controller was made: no score was seen."""
        self.tau.fill_(-math.inf)
        self.sample.fill_(math.nan)
        self.target.fill_(self.initial_fraction)
        for buffer in (self.seen, self.admitted, self.spread, self.started, self.turn):
            buffer.zero_()

    def forward(self, score: Tensor) -> Tensor:
        """Returns tau, float32 `[]`; in training mode it also counts the score `[B, T, H]`.

        A score of NaN stands for no token and is not counted.
        """
        if self.training and score.numel():
            self._remind()
            self._count(score.detach().flatten())
        return self.tau

    @torch.no_grad()
    def _count(self, flat: Tensor) -> None:
        self.seen += (~flat.isnan()).sum()
        self.admitted += (flat >= self.tau).sum()
        place = torch.arange(SAMPLE_SIZE, device=flat.device)
        # Each step replaces its own share of the sample, every SAMPLE_STEPS-th place, and a second
        # forward of the same step replaces it once more. Before tau is placed, all places are its.
        own = (place % SAMPLE_STEPS == self.turn) | ~self.started
        drawn = flat[place * flat.numel() // SAMPLE_SIZE]
        self.sample.copy_(torch.where(own, drawn, self.sample))

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
                f"TargetFraction: {REMIND_AFTER} forwards in training mode and no step, so its "
                "threshold never moves. Call hamblocks.step_controllers(model) after every "
                "optimizer.step(), or hamblocks.hook_controllers(optimizer, model) once.",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self) -> None:
        """Moves tau by what was counted since the last step, over all ranks, and counts anew.

        Every rank of a process group must call it. In eval mode nothing moves, and tau does not
        move if nothing was counted.
        """
        if not self.training:
            return
        self._unstepped = None
        counts, scores = _over_ranks(torch.stack([self.admitted, self.seen]).double(), self.sample)
        self.admitted.zero_()
        self.seen.zero_()
        counted = counts[1] > 0
        place = counted & (self.tau.isinf() | ~self.started)
        error = counts[0] / counts[1].clamp(min=1) - self.target
        ordered = _ordered(scores)
        self._update_spread(_spread(ordered), counted, place)
        # in float64, where the product of a large rate and a large spread is finite
        moved = (self.tau + self.rate * (self.spread.double() * error)).float()
        moved = torch.where(counted, moved, self.tau)
        self.tau.copy_(torch.where(place, _between(ordered, self.target), moved))
        self.started |= counted
        self.turn.copy_((self.turn + counted) % SAMPLE_STEPS)

    def _update_spread(self, spread: Tensor, counted: Tensor, place: Tensor) -> None:
        """The spread of this step's scores where tau is placed anew, else the running average."""
        average = torch.where(counted, self.spread.lerp(spread, 0.1), self.spread)
        self.spread.copy_(torch.where(place, spread, average))

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand. Training moves a finite tau from there, and places an infinite one.

        Raises:
            ValueError: `tau` is NaN or no number.
        """
        super().set_threshold(tau)
        self.started.fill_(True)

    @torch.no_grad()
    def set_fraction(self, fraction: float) -> None:
        """Moves a trained model along the trade-off between quality and cache.

        Sets the target, and tau to `threshold_between(sample, fraction)` of the scores of the last
        training steps. 0 gives tau = +inf and 1 gives tau = -inf, exactly.

        Raises:
            ValueError: `fraction` is outside [0, 1], or no score was seen in training yet.
        """
        fraction = _fraction(fraction)
        if bool(self.sample.isnan().all()):
            raise ValueError(
                "fraction: expected a controller that saw scores in training, got one that saw "
                "none (before training, set its target: controller.fraction = ...)"
            )
        self.fraction = fraction
        self.tau.copy_(threshold_between(self.sample, self.target))
        self.started.fill_(True)

    def extra_repr(self) -> str:
        """Target, rate and threshold."""
        tau = super().extra_repr()
        return f"{self.fraction:g}, rate={self.rate:g}, {tau}" if tau else f"rate={self.rate:g}"


def threshold_between(scores: Tensor, fraction: Tensor) -> Tensor:
    """The threshold between two scores that a share nearest to `fraction` of the scores reaches.

    Let s_1 <= ... <= s_n be the scores without NaN. The threshold

        tau_i = (s_i + s_{i+1}) / 2,    i = 1, ..., n - 1,

    rounded to float32, admits n - i of them. Among those i with s_i < tau_i < s_{i+1}, the result
    is the tau_i with the smallest |n - i - fraction * n|; if two are equally near, the smaller
    tau_i, which admits more. So tau equals no score, and the share it admits never falls as
    `fraction` rises. Special cases:

    - Equal scores are all admitted or all refused: no threshold stands between them. Neither does
      one between two adjacent float32 numbers.
    - An infinite score counts as max + range or min - range of the finite scores, where range is
      max - min (or the larger of 1 and |max| if that is 0), so that the midpoint is finite.
    - If no threshold stands between any two scores (one score, all scores equal), the result is
      -inf for fraction >= 1/2 and +inf below: nearest to the fraction. Without scores it is -inf.
    - fraction = 0 gives +inf, fraction = 1 gives -inf.

    Args:
        scores: floating `[n]`, n >= 2; NaN stands for no score.
        fraction: floating `[]`, in [0, 1].

    Returns:
        tau, float32 `[]`, on the device of `scores`. Nothing waits for the device.
    """
    return _between(_ordered(scores), fraction)


def _between(ordered: Tensor, fraction: Tensor) -> Tensor:
    """`threshold_between` of scores as `_ordered` returns them."""
    count = ordered.isfinite().sum()
    below, above = ordered[:-1], ordered[1:]
    tau = ((below + above) / 2).float()
    stands = (below < tau) & (tau < above)
    admits = count - torch.arange(1, len(ordered), device=ordered.device)
    # exact in float64, so that ties are ties; argmin returns the first of them
    miss = (admits - fraction.double() * count).abs().where(stands, math.inf)
    nothing_stands = torch.where((fraction >= 0.5) | (count == 0), -math.inf, math.inf)
    result = torch.where(stands.any(), _at(tau, miss.argmin()), nothing_stands.float())
    return result.where(fraction > 0, math.inf).where(fraction < 1, -math.inf)


def _spread(ordered: Tensor) -> Tensor:
    """Interquartile range over that of a standard normal, float32 `[]`.

    Where it is 0, because most scores are equal, the standard deviation. Returns 0 without scores.

    Args:
        ordered: scores as `_ordered` returns them.
    """
    count = ordered.isfinite().sum()
    low, high = (_quantile(ordered, count, share) for share in (0.25, 0.75))
    deviation = (ordered - ordered.nanmean()).square().nanmean().sqrt()
    spread = torch.where(high > low, (high - low) / 1.349, deviation)
    return spread.nan_to_num(0.0).clamp(max=FLOAT32_MAX).float()


def _quantile(ordered: Tensor, count: Tensor, share: float) -> Tensor:
    """Quantile of the first `count` ascending values, by linear interpolation."""
    place = (count - 1).clamp(min=0).double() * share
    below = place.floor().long()
    above = place.ceil().long()
    return _at(ordered, below).lerp(_at(ordered, above), place - below)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` for an index `[]`, which that expression would read on the host."""
    return values.gather(0, index.reshape(1)).squeeze(0)


def _ordered(scores: Tensor) -> Tensor:
    """Sorted scores, float64: infinities made finite as in `threshold_between`, NaN last."""
    scores = scores.double()
    finite = scores.isfinite()
    # if no score is finite, both are 0
    highest = scores.where(finite, -math.inf).amax().nan_to_num(neginf=0.0)
    lowest = scores.where(finite, math.inf).amin().nan_to_num(posinf=0.0)
    span = highest - lowest
    span = torch.where(span > 0, span, highest.abs().clamp(min=1))
    # the bounds lie outside the finite scores, so only infinities change, and NaN stays NaN
    return scores.clamp(lowest - span, highest + span).sort().values


def _over_ranks(counts: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Sums counts over the ranks and joins their samples, as they are without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts, sample
    torch.distributed.all_reduce(counts)
    samples = [torch.empty_like(sample) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(samples, sample)
    return counts, torch.cat(samples)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def shortest(value: Tensor) -> float:
    """The number with the fewest digits that rounds to a float32 `[]`: 0.1, not 0.100000001."""
    exact = float(value)
    for digits in range(6, 9):
        short = float(f"{exact:.{digits}g}")
        if struct.unpack("f", struct.pack("f", short))[0] == exact:
            return short
    return exact


def _number(name: str, value: float) -> float:
    """Checks a number, of Python or numpy, and returns it as a float."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value):
        raise ValueError(f"{name}: expected a number that is not NaN, got {value!r}")
    return float(value)


def _fraction(value: float) -> float:
    if not 0 <= _number("fraction", value) <= 1:
        raise ValueError(f"fraction: expected a number in [0, 1], got {value}")
    return float(value)


def step_controllers(model: nn.Module) -> None:
    """Moves the thresholds of all controllers in a model; call it after every optimizer step.

    A controller is found by its type, `hamblocks.protocols.Controller`, among the modules of the
    model and, in the parts of its layers, in plain objects, containers and closures too. A
    controller that several layers share is stepped once. What a controller holds is not stepped
    apart from it, and neither is `model` itself.

    Args:
        model: any module; a single layer or selector too.
    """
    for controller in model_controllers(model):
        controller.step()


def hook_controllers(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Registers a hook so that every `optimizer.step()` calls `step_controllers(model)`.

    Returns:
        The handle of the hook; `handle.remove()` removes it.
    """
    return optimizer.register_step_post_hook(lambda *_: step_controllers(model))
