import torch
from torch import nn

from hamblocks import ops
from hamblocks.ops import NEVER
from hamblocks.protocols import Built

from . import rejected_by


class Attention(Built):
    """A correct attention part: keys scaled by a weight, then the op over dense keys."""

    def make(self, dims):
        self.scale = nn.Parameter(torch.ones(dims.head_dim))

    def prepare(self, q, k, v, *, position, state=None, cu_seqlens=None):
        return q, k * self.scale.to(k.dtype), v, None

    def attend(self, q, k, v, evict_at, **call):
        return ops.selected_attention(q, k, v, evict_at, impl="reference", **call).out

    def forward(self, q, keys):
        dense = keys.dense()
        position = dense.position
        return self.attend(
            q,
            dense.k,
            dense.v,
            dense.evict_at,
            query_position=dense.query_position,
            key_position=position
            if position.dim() == 3
            else position[..., None].expand(dense.k.shape[:3]),
            logit_bias=dense.logit_bias,
            cu_seqlens=dense.cu_seqlens,
        )


@rejected_by("attention_has_its_shapes")
class FlatHeads(Attention):
    """Returns the heads flattened into one dimension."""

    def attend(self, *args, **call):
        return super().attend(*args, **call).flatten(2)


@rejected_by("attention_is_causal")
class SeesTheNext(Attention):
    """Query t sees token t + 1."""

    def attend(self, *args, query_position, **call):
        return super().attend(*args, query_position=query_position + 1, **call)


@rejected_by("attention_gradients_are_causal")
class GradientOfTheMean(Attention):
    """Adds the mean of the values minus itself, detached: only its gradient is left."""

    def attend(self, q, k, v, evict_at, **call):
        mean = v.mean(1, keepdim=True)
        return super().attend(q, k, v + mean - mean.detach(), evict_at, **call)


@rejected_by("attention_rows_are_independent")
class ScalesByTheBatch(Attention):
    """Uses the largest norm of the batch as temperature."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(
            q / (1 + q.abs().amax((0, 2, 3), keepdim=True)), k, v, evict_at, **call
        )


@rejected_by("attention_packed_is_one_by_one")
class IgnoresBorders(Attention):
    """Treats a packed batch row as one sequence."""

    def attend(self, *args, cu_seqlens, **call):
        return super().attend(*args, **call)


@rejected_by("attention_any_split_is_one_pass")
class ForgetsTheCache(Attention):
    """Reads only the new tokens, and none of the cache."""

    def attend(self, q, k, v, evict_at, *, query_position, key_position, **call):
        begin = query_position.amin(1)[:, None, None]
        evict_at = torch.where(key_position >= begin, evict_at, key_position)
        return super().attend(
            q, k, v, evict_at, query_position=query_position, key_position=key_position, **call
        )


@rejected_by("attention_same_call_same_bits")
class AttentionDropout(Attention):
    """Drops values out in eval mode too."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, nn.functional.dropout(v, 0.1), evict_at, **call)


@rejected_by("attention_nothing_given_changes")
class ClampsInPlace(Attention):
    """Clamps lifetimes in place."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, v, evict_at.clamp_(max=10**6), **call)


@rejected_by("attention_strides_do_not_matter")
class DenseQueries(Attention):
    """Assumes that queries are contiguous."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(
            torch.as_strided(q, q.shape, torch.empty(q.shape).stride()), k, v, evict_at, **call
        )


@rejected_by("attention_reads_no_unwritten_memory")
class AccumulatesIntoEmpty(Attention):
    """Adds the read to uninitialised memory."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, v, evict_at, **call) + 0 * torch.empty_like(q)


@rejected_by("attention_is_always_finite")
class ExponentWithoutMaximum(Attention):
    """Computes a softmax without subtracting the largest logit."""

    def attend(self, q, k, v, evict_at, **call):
        out = super().attend(q, k, v, evict_at, **call)
        return out + 0 * (q.float() @ q.float().mT).exp().sum(-1, keepdim=True).to(q.dtype)


@rejected_by("attention_gradients_are_right")
class BiasWithoutGradient(Attention):
    """Detaches the logit bias."""

    def attend(self, *args, logit_bias=None, **call):
        return super().attend(
            *args, logit_bias=None if logit_bias is None else logit_bias.detach(), **call
        )


@rejected_by("attention_stored_tokens_are_seen")
class IgnoresTheBias(Attention):
    """Leaves the logit bias out, so that a learned router never learns."""

    def attend(self, *args, logit_bias=None, **call):
        return super().attend(*args, **call)


@rejected_by("attention_state_dict_is_all_there_is")
class LostTemperature(Attention):
    """Draws a temperature that the state dict does not contain."""

    def make(self, dims):
        super().make(dims)
        self.temperature = 1 + torch.rand(()).item()

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(self.temperature * q, k, v, evict_at, **call)


@rejected_by("attention_compiled_is_eager")
class CountsOnTheHost(Attention):
    """Branches on values: skips attention where nothing is stored."""

    def attend(self, q, k, v, evict_at, **call):
        return (
            super().attend(q, k, v, evict_at, **call)
            if bool((evict_at > 0).any())
            else torch.zeros_like(q)
        )


@rejected_by("attention_is_built_once")
class BuiltAgain(Attention):
    """Accepts a second build, so that two layers share weights."""

    def build(self, dims):
        self.make(dims)


@rejected_by("attention_works_in_a_layer")
class AnotherSignWhenDecoding(Attention):
    """Negates a query that comes alone and is not the first."""

    def forward(self, q, keys):
        alone = q.shape[1] == 1 and bool((keys.query_position > 0).any())
        return super().forward(-q if alone else q, keys)


@rejected_by("attention_unseen_tokens_do_not_leak")
class SeesItselfAnyway(Attention):
    """Lets a token that was never stored see itself."""

    def attend(self, q, k, v, evict_at, *, key_position, **call):
        own = key_position.clamp(max=NEVER - 1) + 1
        ends = torch.maximum(evict_at.expand(own.shape), own.int())
        return super().attend(q, k, v, ends, key_position=key_position, **call)


@rejected_by("attention_evicted_tokens_do_not_leak")
class OneQueryTooLong(Attention):
    """Lets the query at evict_at still see the token."""

    def attend(self, q, k, v, evict_at, *, key_position, **call):
        late = (evict_at > key_position) & (evict_at < NEVER)
        return super().attend(q, k, v, evict_at + late.int(), key_position=key_position, **call)


@rejected_by("attention_stored_tokens_are_seen")
class NotItself(Attention):
    """Hides its own token from each query."""

    def attend(self, *args, query_position, **call):
        return super().attend(*args, query_position=query_position - 1, **call)


@rejected_by("attention_heads_are_grouped")
class HeadsByModulo(Attention):
    """Reads key/value head h modulo Hkv with query head h."""

    def attend(self, q, k, v, evict_at, **call):
        group = q.shape[2] // k.shape[2]
        mixed = q.unflatten(2, (group, -1)).transpose(2, 3).flatten(2, 3)
        out = super().attend(mixed, k, v, evict_at, **call)
        return out.unflatten(2, (-1, group)).transpose(2, 3).flatten(2, 3)


@rejected_by("attention_seeing_nothing_is_zero")
class MeanOfNothing(Attention):
    """Returns the mean of all values to a query that sees nothing."""

    def attend(self, q, k, v, evict_at, **call):
        out = super().attend(q, k, v, evict_at, **call)
        blank = (out == 0).all(-1, keepdim=True)
        return torch.where(blank, v.mean((1, 2), keepdim=True), out) if v.shape[1] else out


@rejected_by("attention_one_lifetime_serves_all_heads")
class LifetimeOfTheFirstHead(Attention):
    """Applies one lifetime for all heads to the first head; the other heads keep everything."""

    def attend(self, q, k, v, evict_at, **call):
        if evict_at.shape[2] == 1 and k.shape[2] > 1:
            evict_at = torch.cat(
                [evict_at, torch.full_like(evict_at, NEVER).expand(-1, -1, k.shape[2] - 1)], 2
            )
        return super().attend(q, k, v, evict_at, **call)


@rejected_by("attention_padding_is_ignored")
class ReadsPadding(Attention):
    """Ignores positions, so that padding is visible until its evict_at."""

    def attend(self, *args, key_position, **call):
        return super().attend(*args, key_position=0 * key_position, **call)
