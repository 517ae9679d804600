import torch
from torch import nn

import hamblocks as hb
from hamblocks import ops
from hamblocks.ops import NEVER
from hamblocks.protocols import Built

from . import rejected_by


class Attention(Built):
    """Attention that is right: keys scaled by a weight, then the op, with or without a cache."""

    def make(self, dims):
        self.scale = nn.Parameter(torch.ones(dims.head_dim))

    def attend(self, q, k, v, evict_at, **call):
        return ops.selected_attention(q, k, v, evict_at, impl="reference", **call).out

    def forward(self, q, k, v, evict_at, *, position, logit_bias=None, cu_seqlens=None, cache=None):
        k = k * self.scale.to(k.dtype)
        if cache is None:
            return self.attend(
                q, k, v, evict_at, logit_bias=logit_bias, cu_seqlens=cu_seqlens
            ), None
        cache = cache.append(k, v, position, evict_at, logit_bias)
        stored = cache.read()
        where = {
            "query_position": position,
            "key_position": stored.position,
            "logit_bias": stored.logit_bias,
        }
        return self.attend(q, stored.k, stored.v, stored.evict_at, **where), cache


@rejected_by("attention_has_its_shapes")
class FlatHeads(Attention):
    """Returns the heads side by side."""

    def attend(self, *args, **call):
        return super().attend(*args, **call).flatten(2)


@rejected_by("attention_is_causal")
class SeesTheNext(Attention):
    """Query t sees token t + 1."""

    def attend(self, q, k, v, evict_at, *, query_position=None, cu_seqlens=None, **call):
        if query_position is None and cu_seqlens is None:
            query_position = 1 + torch.arange(q.shape[1]).expand(q.shape[:2]).int()
            return super().attend(q, k, v, evict_at, query_position=query_position, **call)
        return super().attend(
            q, k, v, evict_at, query_position=query_position, cu_seqlens=cu_seqlens, **call
        )


@rejected_by("attention_gradients_are_causal")
class GradientOfTheMean(Attention):
    """Centres values over the sequence, without changing them."""

    def attend(self, q, k, v, evict_at, **call):
        mean = v.mean(1, keepdim=True)
        return super().attend(q, k, v + mean - mean.detach(), evict_at, **call)


@rejected_by("attention_rows_are_independent")
class ScalesByTheBatch(Attention):
    """The temperature is the largest norm of the batch."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(
            q / (1 + q.abs().amax((0, 2, 3), keepdim=True)), k, v, evict_at, **call
        )


@rejected_by("attention_packed_is_one_by_one")
class IgnoresBorders(Attention):
    """A packed row is one sequence."""

    def attend(self, q, k, v, evict_at, *, cu_seqlens=None, **call):
        if cu_seqlens is None:
            return super().attend(q, k, v, evict_at, **call)
        ends = torch.where(
            evict_at > hb.ops.select_window(v[..., 0], 0, cu_seqlens=cu_seqlens), NEVER, 0
        ).int()
        return super().attend(q, k, v, ends, **call)


@rejected_by("attention_any_split_is_one_pass")
class ForgetsTheCache(Attention):
    """Stores, and reads the new tokens alone."""

    def forward(self, q, k, v, evict_at, *, position, logit_bias=None, cu_seqlens=None, cache=None):
        if cache is None:
            return super().forward(
                q, k, v, evict_at, position=position, logit_bias=logit_bias, cu_seqlens=cu_seqlens
            )
        _, cache = super().forward(
            q, k, v, evict_at, position=position, logit_bias=logit_bias, cache=cache
        )
        where = {"query_position": position, "key_position": position[..., None].contiguous()}
        read = self.attend(
            q, k * self.scale.to(k.dtype), v, evict_at, logit_bias=logit_bias, **where
        )
        return read, cache


@rejected_by("attention_same_call_same_bits")
class AttentionDropout(Attention):
    """Dropout of values in eval mode."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, nn.functional.dropout(v, 0.1), evict_at, **call)


@rejected_by("attention_nothing_given_changes")
class ClampsInPlace(Attention):
    """Ends of lifetimes are clamped in place."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, v, evict_at.clamp_(max=10**6), **call)


@rejected_by("attention_strides_do_not_matter")
class DenseQueries(Attention):
    """Takes queries to lie in one piece."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(
            torch.as_strided(q, q.shape, torch.empty(q.shape).stride()), k, v, evict_at, **call
        )


@rejected_by("attention_reads_no_unwritten_memory")
class AccumulatesIntoEmpty(Attention):
    """Adds the read to memory that nobody wrote."""

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(q, k, v, evict_at, **call) + 0 * torch.empty_like(q)


@rejected_by("attention_is_always_finite")
class ExponentWithoutMaximum(Attention):
    """A softmax that does not subtract the largest logit."""

    def attend(self, q, k, v, evict_at, **call):
        out = super().attend(q, k, v, evict_at, **call)
        return out + 0 * (q.float() @ q.float().mT).exp().sum(-1, keepdim=True).to(q.dtype)


@rejected_by("attention_gradients_are_right")
class BiasWithoutGradient(Attention):
    """The gradient of the logit bias is dropped."""

    def attend(self, *args, logit_bias=None, **call):
        return super().attend(
            *args, logit_bias=None if logit_bias is None else logit_bias.detach(), **call
        )


@rejected_by("attention_state_dict_is_all_there_is")
class LostTemperature(Attention):
    """A temperature that is drawn and not saved."""

    def make(self, dims):
        super().make(dims)
        self.temperature = 1 + torch.rand(()).item()

    def attend(self, q, k, v, evict_at, **call):
        return super().attend(self.temperature * q, k, v, evict_at, **call)


@rejected_by("attention_compiled_is_eager")
class CountsOnTheHost(Attention):
    """Skips attention where nothing is stored."""

    def attend(self, q, k, v, evict_at, **call):
        return (
            super().attend(q, k, v, evict_at, **call)
            if bool((evict_at > 0).any())
            else torch.zeros_like(q)
        )


@rejected_by("attention_is_built_once")
class BuiltAgain(Attention):
    """A second layer takes the weights over."""

    def build(self, dims):
        self.make(dims)


@rejected_by("attention_works_in_a_layer")
class PositionsOfThePiece(Attention):
    """Positions are counted from the start of the piece once a layer commits what it stored."""

    def forward(self, q, k, v, evict_at, *, position, cache=None, **call):
        if cache is not None and bool((cache.seen > 0).any()) and q.shape[1] == 1:
            k = -k
        return super().forward(q, k, v, evict_at, position=position, cache=cache, **call)


@rejected_by("attention_unseen_tokens_do_not_leak")
class StoresEverything(Attention):
    """A token that was never stored still sees itself."""

    def attend(self, q, k, v, evict_at, *, key_position=None, cu_seqlens=None, **call):
        own = (
            hb.ops.select_window(v[..., 0], 1, cu_seqlens=cu_seqlens)
            if key_position is None
            else evict_at
        )
        ends = torch.maximum(evict_at, own[..., : evict_at.shape[2]])
        return super().attend(
            q, k, v, ends, key_position=key_position, cu_seqlens=cu_seqlens, **call
        )


@rejected_by("attention_evicted_tokens_do_not_leak")
class OneQueryTooLong(Attention):
    """The query at evict_at still sees the token."""

    def attend(self, q, k, v, evict_at, *, key_position=None, cu_seqlens=None, **call):
        own = (
            hb.ops.select_window(v[..., 0], 0, cu_seqlens=cu_seqlens)
            if key_position is None
            else key_position
        )
        late = (evict_at > own[..., : evict_at.shape[2]]) & (evict_at < NEVER)
        return super().attend(
            q, k, v, evict_at + late.int(), key_position=key_position, cu_seqlens=cu_seqlens, **call
        )


@rejected_by("attention_stored_tokens_are_seen")
class NotItself(Attention):
    """A query does not see its own token."""

    def attend(self, q, k, v, evict_at, *, query_position=None, cu_seqlens=None, **call):
        if query_position is None and cu_seqlens is None:
            query_position = torch.arange(q.shape[1]).expand(q.shape[:2]).int() - 1
            return super().attend(q, k, v, evict_at, query_position=query_position, **call)
        return super().attend(
            q, k, v, evict_at, query_position=query_position, cu_seqlens=cu_seqlens, **call
        )


@rejected_by("attention_heads_are_grouped")
class HeadsByModulo(Attention):
    """Query head h reads key/value head h modulo Hkv."""

    def attend(self, q, k, v, evict_at, **call):
        group = q.shape[2] // k.shape[2]
        mixed = q.unflatten(2, (group, -1)).transpose(2, 3).flatten(2, 3)
        out = super().attend(mixed, k, v, evict_at, **call)
        return out.unflatten(2, (-1, group)).transpose(2, 3).flatten(2, 3)


@rejected_by("attention_seeing_nothing_is_zero")
class MeanOfNothing(Attention):
    """A query that sees nothing reads the mean of all values."""

    def attend(self, q, k, v, evict_at, **call):
        out = super().attend(q, k, v, evict_at, **call)
        blank = (out == 0).all(-1, keepdim=True)
        return torch.where(blank, v.mean((1, 2), keepdim=True), out) if v.shape[1] else out


@rejected_by("attention_one_lifetime_serves_all_heads")
class LifetimeOfTheFirstHead(Attention):
    """One lifetime for all heads is taken to be that of the first, the others keep everything."""

    def attend(self, q, k, v, evict_at, **call):
        if evict_at.shape[2] == 1 and k.shape[2] > 1:
            evict_at = torch.cat(
                [evict_at, torch.full_like(evict_at, NEVER).expand(-1, -1, k.shape[2] - 1)], 2
            )
        return super().attend(q, k, v, evict_at, **call)


@rejected_by("attention_padding_is_ignored")
class StoresPadding(Attention):
    """Padding is stored at position 0."""

    def forward(self, q, k, v, evict_at, *, position, **call):
        return super().forward(q, k, v, evict_at, position=position.clamp(min=0), **call)
