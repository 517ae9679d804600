import torch
from torch import nn

import hamblocks as hb
from hamblocks.ops import NEVER
from hamblocks.selectors import Composable

from . import rejected_by


class TopK:
    """A streaming top-k that is right, and plain: no base class."""

    k = 3

    def __init__(self):
        self.inner = hb.TopK(self.k)

    def start(self, batch_size, heads, device=None):
        return self.inner.start(batch_size, heads, device)

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        return self.inner(score, ledger, position=position, cu_seqlens=cu_seqlens)


class Threshold(Composable):
    """A threshold that is right, with a tau to set."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tau", torch.tensor(0.25))

    def set_threshold(self, tau):
        self.tau.fill_(tau)

    def kept(self, score):
        return (score >= self.tau) & (self.tau < float("inf"))

    def forward(self, score, ledger=None, *, position=None, cu_seqlens=None):
        where = hb.ops.select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
        return hb.Selection(torch.where(self.kept(score) & (where >= 0), NEVER, where))


@rejected_by("selector_has_its_shapes")
class LongLifetimes(Threshold):
    """Lifetimes are int64."""

    def forward(self, *args, **call):
        return hb.Selection(super().forward(*args, **call).evict_at.long())


@rejected_by("selector_is_causal")
class MedianInTraining(Threshold):
    """The threshold of training is the median of the sequence."""

    def kept(self, score):
        real = score.nan_to_num(0, 9, -9)
        return real >= real.median(1, keepdim=True).values if self.training else super().kept(score)


@rejected_by("selector_is_causal")
class AboveTheMean(Threshold):
    """Stores what is above the mean of the sequence."""

    def kept(self, score):
        return score >= score.nan_to_num(0, 9, -9).mean(1, keepdim=True)


@rejected_by("selector_any_split_is_one_pass")
class LaterTiesWin(TopK):
    """In pieces, ties go to the later token."""

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        if ledger is not None:
            score = score + 1e-4 * position[..., None]
        return super().__call__(score, ledger, position=position, cu_seqlens=cu_seqlens)


@rejected_by("selector_only_lowers")
class BringsBack(TopK):
    """Tells that a token it still lists lives on a little after now."""

    def __call__(self, score, ledger=None, **call):
        selection = super().__call__(score, ledger, **call)
        if selection.lowered is None:
            return selection
        there = selection.lowered.position >= 0
        late = torch.where(
            there & (selection.lowered.evict_at < NEVER), 0, selection.lowered.evict_at
        )
        return selection._replace(lowered=selection.lowered._replace(evict_at=late))


@rejected_by("selector_ledger_does_not_grow")
class KeepsAList(TopK):
    """The ledger lists every token that ever came."""

    def __call__(self, score, ledger=None, **call):
        if ledger is None:
            return super().__call__(score, ledger, **call)
        k = ledger.position.shape[1]
        inner = hb.TopK(k)(score, ledger, **call)
        more = score.shape[1]
        grown = (
            torch.cat([x.new_full((x.shape[0], more, x.shape[2]), -1), x], 1) for x in inner.ledger
        )
        return inner._replace(ledger=type(inner.ledger)(*grown))


@rejected_by("selector_packed_is_one_by_one")
class IgnoresBorders(TopK):
    """Packed sequences compete with each other."""

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        where = (
            hb.ops.select_window(score, 0, cu_seqlens=cu_seqlens)
            if cu_seqlens is not None
            else position
        )
        return super().__call__(score, ledger, position=where)


@rejected_by("selector_rows_are_independent")
class BatchQuantile(Threshold):
    """Tau is the largest score at that position in the batch."""

    def kept(self, score):
        return score >= score.nan_to_num(0).amax(0, keepdim=True)


@rejected_by("selector_padding_is_ignored")
class CountsPadding(TopK):
    """Padding competes like a token."""

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        if ledger is not None:
            position = torch.where(position < 0, position.amax(1, keepdim=True) + 1, position)
        return super().__call__(score, ledger, position=position, cu_seqlens=cu_seqlens)


@rejected_by("selector_same_call_same_bits")
class RandomTies(Threshold):
    """A coin decides about scores that equal tau."""

    def kept(self, score):
        return (score > self.tau) | ((score == self.tau) & (torch.rand_like(score) > 0.5))


@rejected_by("selector_nothing_given_changes")
class WritesIntoTheLedger(TopK):
    """The ledger that came in is overwritten."""

    def __call__(self, score, ledger=None, **call):
        selection = super().__call__(score, ledger, **call)
        if ledger is not None:
            ledger.position.copy_(selection.ledger.position)
        return selection


@rejected_by("selector_reads_no_unwritten_memory")
class EmptyMask(Threshold):
    """The mask of the last head is never written."""

    def kept(self, score):
        mask = torch.empty(score.shape, dtype=torch.int32)
        mask[..., :-1] = super().kept(score)[..., :-1].int()
        return mask > 0


@rejected_by("selector_or_and_and_are_a_lattice")
class OrIsAnd(Threshold):
    """The operators are exchanged."""

    def __or__(self, other):
        return hb.AllOf(self, other)

    def __and__(self, other):
        return hb.AnyOf(self, other)


@rejected_by("selector_or_and_and_are_a_lattice")
class Stateful(Threshold):
    """Decides otherwise on every second call."""

    calls = 0

    def kept(self, score):
        self.calls += 1
        return super().kept(score) & (self.calls % 2 == 0)


@rejected_by("selector_raising_tau_never_keeps_more")
class NearTau(Threshold):
    """Stores what is near the threshold."""

    def kept(self, score):
        return (score - self.tau).abs() < 0.3


@rejected_by("selector_threshold_is_reached_by_equal_scores")
class Above(Threshold):
    """Compares with > where it should be >=."""

    def kept(self, score):
        return score > self.tau


@rejected_by("selector_threshold_is_reached_by_equal_scores")
class StoresAtInfinity(Threshold):
    """At tau = +inf a score of +inf is stored."""

    def kept(self, score):
        return score >= self.tau


@rejected_by("selector_state_dict_is_all_there_is")
class TauOutside(Threshold):
    """Tau is an attribute, not a buffer."""

    def __init__(self):
        nn.Module.__init__(self)
        self.tau = torch.tensor(0.25)

    def set_threshold(self, tau):
        self.tau = torch.tensor(tau)


@rejected_by("selector_compiled_is_eager")
class BranchesOnScores(Threshold):
    """Takes a shortcut where nothing reaches tau."""

    def kept(self, score):
        return (
            super().kept(score)
            if (score >= self.tau).any()
            else torch.zeros_like(score, dtype=torch.bool)
        )


@rejected_by("selector_refuses_a_packed_batch_beside_a_ledger")
class AcceptsPacked(TopK):
    """Treats a packed batch beside a ledger as one sequence."""

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        if ledger is not None and cu_seqlens is not None:
            position, cu_seqlens = torch.arange(score.shape[1])[None].int(), None
        return super().__call__(score, ledger, position=position, cu_seqlens=cu_seqlens)


@rejected_by("selector_works_in_a_layer")
class WindowOfThePiece(Threshold):
    """A window by the place in the piece, where its position is meant."""

    def forward(self, score, ledger=None, *, position=None, cu_seqlens=None):
        return hb.Window(2)(score, cu_seqlens=cu_seqlens)


class Around:
    """A selector of ours that is right, and a mistake around it."""

    def __init__(self):
        self.inner = self.make()

    def make(self):
        return hb.TopK(3, delay=2)

    def start(self, batch_size, heads, device=None):
        return self.inner.start(batch_size, heads, device)

    def before(self, ledger):
        return ledger

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        ledger = None if ledger is None else self.before(ledger)
        return self.inner(score, ledger, position=position, cu_seqlens=cu_seqlens)


@rejected_by("selector_any_split_is_one_pass")
class LowersTooEarly(Around):
    """Tokens that a later piece beats leave without the delay."""

    def __call__(self, score, ledger=None, **call):
        selection = super().__call__(score, ledger, **call)
        if ledger is None:
            return selection
        early = hb.TopK(3)(score, ledger, **call)
        return selection._replace(lowered=early.lowered)


@rejected_by("selector_any_split_is_one_pass")
class ForgetsTheCooldown(Around):
    """A piece may begin with a token that comes too early."""

    def make(self):
        return hb.Cooldown(hb.Threshold(0.25), 4)

    def before(self, ledger):
        return ledger._replace(last=torch.full_like(ledger.last, -1))


@rejected_by("selector_packed_is_one_by_one")
class CoolsDownAcrossBorders(Around):
    """The last token of a packed sequence delays the first of the next."""

    def make(self):
        return hb.Cooldown(hb.Threshold(-1.0), 4)

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        selection = super().__call__(score, ledger, position=position, cu_seqlens=cu_seqlens)
        if cu_seqlens is None:
            return selection
        apart = self.inner(score).evict_at == NEVER
        own = hb.ops.select_window(score, 0, cu_seqlens=cu_seqlens)
        return hb.Selection(torch.where(apart, selection.evict_at, own))


@rejected_by("selector_only_lowers")
class BringsBackWhatABudgetRefused(Around):
    """The lowered lifetimes are those of the wrapped selector."""

    def make(self):
        return hb.Budget(hb.TopK(4), 2)

    def __call__(self, score, ledger=None, **call):
        selection = super().__call__(score, ledger, **call)
        if ledger is None:
            return selection
        inside = self.inner.inner(score, ledger.inner, **call)
        return selection._replace(lowered=inside.lowered)


@rejected_by("selector_is_causal")
class PromptOfWhatCame(Around):
    """The fraction is of the tokens that came, not of a prompt of a given length."""

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        best = score.nan_to_num(0, 9, -9).topk(-(-score.shape[1] // 2), 1).values[:, -1:]
        own = hb.ops.select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
        return hb.Selection(torch.where(score >= best, NEVER, own))


@rejected_by("selector_padding_is_ignored")
class PaddingWeighs(Around):
    """The scores of padding count in the sum of all errors."""

    def make(self):
        return hb.ErrorMass(0.5, 20)

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        if ledger is not None:
            more = torch.where(position[..., None] < 0, score.nan_to_num(0, 9, 0).clamp(min=0), 0)
            ledger = ledger._replace(total=ledger.total + more.double().sum(1, keepdim=True))
        return super().__call__(score, ledger, position=position, cu_seqlens=cu_seqlens)


@rejected_by("selector_any_split_is_one_pass")
class MassOfThePiece(Around):
    """The sum of all errors starts anew with every piece."""

    def make(self):
        return hb.ErrorMass(0.5, 20)

    def before(self, ledger):
        return ledger._replace(total=torch.zeros_like(ledger.total))


@rejected_by("selector_ledger_does_not_grow")
class LedgerGrowsToo(Around):
    """The ledger has as many slots as tokens are stored by now."""

    def make(self):
        return hb.SublinearGrowth(0.9, max_tokens=64)

    def __call__(self, score, ledger=None, **call):
        if ledger is not None:
            lacks = self.inner.slots - ledger.position.shape[1]
            ledger = type(ledger)(
                *(
                    torch.cat([torch.full_like(x[:, :1], -1).expand(-1, lacks, -1), x], 1)
                    for x in ledger
                )
            )
        selection = super().__call__(score, ledger, **call)
        if ledger is None:
            return selection
        used = int((selection.ledger.position >= 0).sum(1).max())
        least = selection.ledger.position.shape[1] - used
        shorter = type(ledger)(*(x[:, least:] for x in selection.ledger))
        taken = selection.lowered.position[:, lacks:], selection.lowered.evict_at[:, lacks:]
        return selection._replace(ledger=shorter, lowered=hb.Lifetimes(*taken))

    def start(self, batch_size, heads, device=None):
        return type(self.inner.start(1, 1))(
            *(x[:, :0] for x in self.inner.start(batch_size, heads, device))
        )
