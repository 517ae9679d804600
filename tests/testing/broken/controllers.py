import math

import torch
from torch import nn

from . import rejected_by


class Controller(nn.Module):
    """A controller that is right: tau follows the median, a step at a time."""

    fraction = 0.5

    def __init__(self):
        super().__init__()
        self.register_buffer("tau", torch.tensor(0.0))
        self.count, self.over = torch.tensor(0.0), torch.tensor(0.0)

    def _apply(self, fn, recurse=True):
        kept = {name: x.clone() for name, x in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            setattr(self, name, x)
        return self

    def forward(self, score):
        if self.training:
            real = ~score.isnan()
            self.count += real.sum()
            self.over += (score >= self.tau).sum()
        return self.tau.clone()

    def step(self):
        if self.training and self.count > 0:
            self.tau += 0.5 * (self.over / self.count - self.fraction)
            self.count.zero_()
            self.over.zero_()

    def set_threshold(self, tau):
        if math.isnan(tau):
            raise ValueError(f"tau: expected a number, got {tau}")
        self.tau.fill_(tau)

    def set_fraction(self, fraction):
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
        # the quantile of a standard normal, which the check draws its scores from
        self.tau.copy_(-torch.special.ndtri(torch.tensor(float(fraction))))


@rejected_by("controller_counts_are_no_buffers")
class CountsInBuffers(Controller):
    """Counts in buffers, which DDP overwrites before every forward."""

    def __init__(self):
        super().__init__()
        for name in ("count", "over"):
            delattr(self, name)
            self.register_buffer(name, torch.tensor(0.0))


@rejected_by("controller_averages_are_thresholds")
class BeginsAtInfinity(Controller):
    """Tau begins at -inf, whose average with any number is NaN."""

    def __init__(self):
        super().__init__()
        self.tau.fill_(-math.inf)

    def step(self):
        if self.training and self.count > 0:
            self.tau.clamp_(min=-1)
        super().step()


@rejected_by("controller_set_fraction_admits_it")
class SetsTheRest(Controller):
    """Sets the fraction that is not admitted."""

    def set_fraction(self, fraction):
        super().set_fraction(1 - fraction)


@rejected_by("controller_tau_is_a_number")
class MeanOfScores(Controller):
    """Tau is a mean, NaN where a score is."""

    def step(self):
        self.tau.copy_(self.count)

    def forward(self, score):
        self.count.copy_(score.mean())
        return self.tau.clone()


@rejected_by("controller_tau_stays_float32")
class CastsAlong(Controller):
    """Tau is rounded with the weights of the model."""

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


@rejected_by("controller_moves_only_in_step")
class MovesAtOnce(Controller):
    """Every call moves tau, so that gradient accumulation counts as many steps."""

    def forward(self, score):
        tau = super().forward(score)
        if score.numel():
            self.step()
        return tau


@rejected_by("controller_rests_in_eval")
class LearnsInEval(Controller):
    """Counts and moves in eval mode."""

    def forward(self, score):
        self.count += (~score.isnan()).sum()
        self.over += (score >= self.tau).sum()
        return self.tau.clone()


@rejected_by("controller_steps_without_scores_move_nothing")
class CountsPadding(Controller):
    """Padding counts as a token below tau."""

    def forward(self, score):
        if self.training:
            self.count += score.numel()
            self.over += (score >= self.tau).sum()
        return self.tau.clone()


@rejected_by("controller_reaches_its_fraction")
class WrongSign(Controller):
    """Moves away from its target."""

    def step(self):
        self.over.copy_(self.count - self.over)
        super().step()


@rejected_by("controller_set_threshold_sets_tau")
class TakesAnything(Controller):
    """Accepts NaN."""

    def set_threshold(self, tau):
        self.tau.fill_(tau)


@rejected_by("controller_state_dict_is_all_there_is")
class Unsaved(Controller):
    """Forgets tau in the state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tau", torch.tensor(0.0), persistent=False)


@rejected_by("controller_same_call_same_bits")
class Stochastic(Controller):
    """A step of random size."""

    def step(self):
        before = self.tau.clone()
        super().step()
        self.tau.copy_(before + torch.rand(()) * (self.tau - before))


@rejected_by("controller_nothing_given_changes")
class SortsInPlace(Controller):
    """Replaces NaN in the scores it was given."""

    def forward(self, score):
        return super().forward(score.nan_to_num_(-math.inf).sub_(0).add_(1e-3))


@rejected_by("controller_reads_no_unwritten_memory")
class EmptyCounter(Controller):
    """The first tau is memory that nobody wrote."""

    def forward(self, score):
        tau = super().forward(score)
        return torch.where(self.count > 1e6, tau, torch.empty(()))


@rejected_by("controller_compiled_is_eager")
class ReadsTau(Controller):
    """Reads the count on the host in every call."""

    def forward(self, score):
        return super().forward(score) if self.count.item() < 1e9 else self.tau


@rejected_by("controller_state_dict_is_all_there_is")
class PlainSchedule:
    """A schedule in a plain object, which no model saves."""

    def __init__(self):
        self.tau = torch.tensor(0.0)

    def __call__(self, score):
        return self.tau

    def step(self):
        self.tau = self.tau + 0.01
