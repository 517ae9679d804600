import torch
from torch import nn

import hamblocks as hb
from hamblocks import ops
from hamblocks.protocols import Built

from . import rejected_by


class Memory(Built):
    """A delta memory that is right: no convolution, a learned write strength."""

    reach = 0

    def make(self, dims):
        self.beta = nn.Linear(dims.hidden_size, dims.num_heads)

    def rule(self, q, k, v, **call):
        return ops.gated_delta_rule(q, k, v, **call)

    def forward(self, x, q, k, v, *, position, state=None, cu_seqlens=None, metric=None):
        group = q.shape[2] // k.shape[2]
        k, v = (y.repeat_interleave(group, 2) for y in (k, v))
        k = nn.functional.normalize(k, dim=-1)
        call = {
            "beta": self.beta(x).sigmoid().to(torch.promote_types(x.dtype, torch.float32)),
            "initial_state": state,
        }
        result = self.rule(
            q, k, v, **call, cu_seqlens=cu_seqlens, output_residual=metric is None, metric=metric
        )
        trace = hb.MemoryTrace(k, v, call["beta"], result.residual, result.score, position)
        return result.out, trace, result.final_state


@rejected_by("memory_can_be_called")
class ReturnsNoState(Memory):
    """Returns the read and the trace only."""

    def forward(self, *args, **call):
        read, trace, _ = super().forward(*args, **call)
        return read, trace


@rejected_by("memory_can_be_called")
class IgnoresMetric(Memory):
    """Does not take the metric that a layer passes."""

    def forward(self, x, q, k, v, *, position, state=None, cu_seqlens=None):
        return super().forward(x, q, k, v, position=position, state=state, cu_seqlens=cu_seqlens)


@rejected_by("memory_has_its_shapes")
class Upcasts(Memory):
    """Reads in float32 whatever came in."""

    def forward(self, *args, **call):
        read, trace, state = super().forward(*args, **call)
        return read.to(torch.promote_types(read.dtype, torch.float32)), trace, state


@rejected_by("memory_is_causal")
class NormalizesKeysOverTime(Memory):
    """Keys are divided by their norm over time."""

    def rule(self, q, k, v, **call):
        return super().rule(q, k / (1 + k.norm(dim=1, keepdim=True)), v, **call)


class Chunks(Memory):
    """Runs 64 tokens at a time; `carried` is what a chunk makes of the state before it."""

    def carried(self, state):
        return state

    def rule(self, q, k, v, *, beta, initial_state, cu_seqlens, **call):
        if cu_seqlens is not None:
            more = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
            return super().rule(q, k, v, beta=beta, **more, **call)
        found, state = [], initial_state
        for chunk in zip(*(x.split(64, 1) for x in (q, k, v, beta)), strict=True):
            state = self.carried(state) if found else state
            found.append(super().rule(*chunk[:3], beta=chunk[3], initial_state=state, **call))
            state = found[-1].final_state
        out, _, residual, score = (
            None if x[0] is None else torch.cat(x, 1) for x in zip(*found, strict=True)
        )
        return ops.DeltaRuleOutput(out, state, residual, score)


@rejected_by("memory_any_split_is_one_pass")
class ForgetsBetweenChunks(Chunks):
    """Every chunk but the first starts with half of the state."""

    def carried(self, state):
        return state / 2


@rejected_by("memory_gradients_are_right")
class NoGradientBetweenChunks(Chunks):
    """The gradient ends where a chunk does."""

    def carried(self, state):
        return state.detach()


@rejected_by("memory_score_is_the_surprise_of_the_residual")
class ScoreWithAGradient(Memory):
    """Computes the score of the residual, with its gradient."""

    def rule(self, q, k, v, *, metric, **call):
        result = super().rule(q, k, v, **call | {"output_residual": True, "metric": None})
        if metric is None:
            return result
        return result._replace(score=ops.surprise(result.residual, v, metric=metric))


@rejected_by("memory_gradients_are_causal")
class MixesGradients(Memory):
    """The mean over the sequence has no value and a gradient."""

    def rule(self, q, k, v, **call):
        mean = v.mean(1, keepdim=True)
        return super().rule(q, k, v + mean - mean.detach(), **call)


@rejected_by("memory_rows_are_independent")
class SharesStates(Memory):
    """Every row starts with the state of the first."""

    def rule(self, q, k, v, **call):
        result = super().rule(q, k, v, **call)
        return result._replace(out=result.out + 0.1 * result.out.mean(0, keepdim=True))


@rejected_by("memory_packed_is_one_by_one")
class CarriesAcrossBorders(Memory):
    """The state runs on over the borders of packed sequences."""

    def rule(self, q, k, v, *, initial_state, cu_seqlens, **call):
        if cu_seqlens is None:
            return super().rule(q, k, v, initial_state=initial_state, **call)
        first = None if initial_state is None else initial_state[:1]
        result = super().rule(q, k, v, initial_state=first, **call)
        return result._replace(
            final_state=result.final_state.expand(len(cu_seqlens) - 1, -1, -1, -1)
        )


@rejected_by("memory_any_split_is_one_pass")
class ForgetsItsState(Memory):
    """Every piece starts anew."""

    def rule(self, q, k, v, *, initial_state, **call):
        return super().rule(q, k, v, **call)


@rejected_by("memory_same_call_same_bits")
class DropsWrites(Memory):
    """Dropout that does not know of eval."""

    def rule(self, q, k, v, *, beta, **call):
        return super().rule(q, k, v, beta=beta * (torch.rand_like(beta) > 0.1), **call)


@rejected_by("memory_nothing_given_changes")
class UpdatesTheStateInPlace(Memory):
    """The state that came in is overwritten with the one that goes out."""

    def forward(self, *args, state=None, **call):
        read, trace, new = super().forward(*args, state=state, **call)
        return read, trace, new if state is None else state.copy_(new.detach())


@rejected_by("memory_strides_do_not_matter")
class ViewsValues(Memory):
    """Takes the values as they would lie if they were contiguous."""

    def forward(self, x, q, k, v, **call):
        dense = torch.as_strided(v, v.shape, torch.empty(v.shape).stride())
        return super().forward(x, q, k, dense, **call)


@rejected_by("memory_reads_no_unwritten_memory")
class EmptyState(Memory):
    """The first state is memory that nobody wrote."""

    def rule(self, q, k, v, *, initial_state, cu_seqlens, **call):
        if initial_state is None:
            rows = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
            wide = torch.promote_types(q.dtype, torch.float32)
            initial_state = torch.empty(rows, v.shape[2], k.shape[3], v.shape[3], dtype=wide)
        return super().rule(q, k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, **call)


@rejected_by("memory_is_always_finite")
class UnguardedNorm(Memory):
    """Keys are divided by a norm that may be zero."""

    def rule(self, q, k, v, **call):
        return super().rule(q, k / k.norm(dim=-1, keepdim=True), v, **call)


@rejected_by("memory_gradients_are_right")
class NoGradientOfBeta(Memory):
    """The write strength is detached."""

    def rule(self, q, k, v, *, beta, **call):
        return super().rule(q, k, v, beta=beta.detach(), **call)


@rejected_by("memory_state_dict_is_all_there_is")
class ScaleOutside(Memory):
    """A scale that is drawn and not saved."""

    def make(self, dims):
        super().make(dims)
        self.scale = 1 + torch.rand(()).item()

    def rule(self, q, k, v, **call):
        return super().rule(q, k, self.scale * v, **call)


@rejected_by("memory_compiled_is_eager")
class LooksAtTheData(Memory):
    """Skips the recurrence where nothing is written."""

    def rule(self, q, k, v, *, beta, **call):
        scale = 1.0 if bool((beta > 0).any()) else 0.0
        return super().rule(q, k, scale * v, beta=beta, **call)


@rejected_by("memory_is_built_once")
class Rebuilds(Memory):
    """A second layer takes the weights of the first away."""

    def build(self, dims):
        self.make(dims)


@rejected_by("memory_works_in_a_layer")
class StateOfOnePiece(Memory):
    """Hands on the state of the beginning when it is told a metric, as a layer does."""

    def forward(self, *args, state=None, metric=None, **call):
        read, trace, new = super().forward(*args, state=state, metric=metric, **call)
        return read, trace, new if metric is None else torch.zeros_like(new)


@rejected_by("memory_score_is_the_surprise_of_the_residual")
class AnotherMetric(Memory):
    """Scores by l2 whatever metric is asked for."""

    def forward(self, *args, metric=None, **call):
        return super().forward(*args, metric=None if metric is None else "l2", **call)


@rejected_by("memory_predicts_before_it_writes")
class ResidualAfterTheWrite(Memory):
    """The residual is read after the token was written."""

    def forward(self, *args, **call):
        read, trace, state = super().forward(*args, **call)
        if trace.residual is not None:
            trace = trace._replace(
                residual=trace.residual * (1 - trace.beta)[..., None].to(trace.residual.dtype)
            )
        return read, trace, state


@rejected_by("memory_state_has_sequences_first")
class HeadsFirst(Memory):
    """The state has the heads first, so that reordering sequences reorders heads."""

    def forward(self, *args, state=None, **call):
        read, trace, new = super().forward(
            *args, state=None if state is None else state.transpose(0, 1), **call
        )
        return read, trace, new.transpose(0, 1)


@rejected_by("memory_fresh_state_is_zero")
class StartsAtTheIdentity(Memory):
    """A fresh state is the identity matrix."""

    def rule(self, q, k, v, *, initial_state, cu_seqlens, **call):
        if initial_state is None:
            sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
            wide = torch.promote_types(q.dtype, torch.float32)
            initial_state = torch.eye(k.shape[3], v.shape[3], dtype=wide)
            initial_state = initial_state.expand(sequences, v.shape[2], -1, -1)
        return super().rule(q, k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, **call)


@rejected_by("memory_packed_states_are_one_by_one")
class StatesInReverse(Memory):
    """Packed sequences get each other's states."""

    def forward(self, *args, state=None, cu_seqlens=None, **call):
        if state is not None and cu_seqlens is not None:
            state = state.flip(0)
        return super().forward(*args, state=state, cu_seqlens=cu_seqlens, **call)


@rejected_by("memory_any_split_is_one_pass")
class DecaysByPosition(Memory):
    """Decays by the length of the piece."""

    def rule(self, q, k, v, *, beta, **call):
        gone = -0.1 * torch.arange(q.shape[1], dtype=beta.dtype)[None, :, None].expand_as(beta)
        return super().rule(q, k, v, beta=beta, g=gone, **call)


class Waits(Memory):
    """A memory that is right and waits for the selector: two states, of all tokens and of the rest."""

    def forward(self, x, q, k, v, *, state=None, **call):
        read, trace, after = super().forward(
            x, q, k, v, state=None if state is None else state[0], **call
        )
        rest = torch.zeros_like(after) if state is None else state[1]
        return read, trace._replace(q=q), (after, rest)

    def written(self, stored):
        return ~stored

    def read_unstored(self, trace, stored, *, state, cu_seqlens=None):
        result = ops.gated_delta_rule(
            trace.q,
            trace.k,
            trace.v,
            beta=trace.beta * self.written(stored),
            initial_state=state[1],
            cu_seqlens=cu_seqlens,
            output_residual=False,
        )
        return result.out, (state[0], result.final_state)


@rejected_by("memory_reads_what_is_not_stored")
class WritesWhatIsStored(Waits):
    """Reads from all tokens, whatever is stored."""

    def written(self, stored):
        return torch.ones_like(stored)


@rejected_by("memory_reads_what_is_not_stored")
class WritesHalf(Waits):
    """What is not stored is written with half of its strength."""

    def written(self, stored):
        return 0.5 * ~stored


@rejected_by("memory_is_causal")
class DecidesAtTheEnd(Waits):
    """A head whose last token is stored takes all tokens for stored."""

    def written(self, stored):
        return ~stored & ~stored[:, -1:]


@rejected_by("memory_any_split_is_one_pass")
class ForgetsTheRest(Waits):
    """Hands on the state of all tokens only."""

    def read_unstored(self, trace, stored, *, state, cu_seqlens=None):
        read, after = super().read_unstored(trace, stored, state=state, cu_seqlens=cu_seqlens)
        return read, (after[0], torch.zeros_like(after[1]))
