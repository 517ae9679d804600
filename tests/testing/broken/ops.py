import torch

from hamblocks import ops
from hamblocks.ops import NEVER

from . import op_rejected_by

attention, rule = ops.selected_attention, ops.gated_delta_rule


def own_positions(k, key_position, cu_seqlens):
    if key_position is not None:
        return key_position
    return ops.select_window(k[..., 0], 0, cu_seqlens=cu_seqlens)


# delta rule


@op_rejected_by("float64_is_the_reference", rule)
def without_decay(q, k, v, *, g=None, **call):
    """Nothing decays."""
    return rule(q, k, v, **call)


@op_rejected_by("float64_is_the_reference", rule)
def residual_after_the_write(q, k, v, *, beta, **call):
    """The residual is read after the token was written."""
    result = rule(q, k, v, beta=beta, **call)
    if result.residual is None:
        return result
    return result._replace(
        residual=result.residual * (1 - beta[..., None] * (k * k).sum(-1).mean()).to(v.dtype)
    )


@op_rejected_by("float64_is_the_reference", rule)
def heads_by_modulo(q, k, v, **call):
    """Value head h reads query head h modulo H."""
    group = v.shape[2] // q.shape[2]
    return rule(q.repeat(1, 1, group, 1), k.repeat(1, 1, group, 1), v, **call)


@op_rejected_by("float32_is_the_reference", rule)
def state_in_bfloat16(q, k, v, **call):
    """The state that is handed on is rounded to bfloat16."""
    result = rule(q, k, v, **call)
    state = result.final_state
    return result._replace(final_state=state + (state.bfloat16().to(state.dtype) - state).detach())


@op_rejected_by("bfloat16_is_the_reference", rule)
def output_in_eight_bits(q, k, v, **call):
    """The output is rounded more than its dtype asks for."""
    result = rule(q, k, v, **call)
    return result._replace(out=result.out + ((result.out * 16).round() / 16 - result.out).detach())


@op_rejected_by("packed_is_one_by_one", rule)
def carries_across_borders(q, k, v, *, cu_seqlens=None, initial_state=None, **call):
    """The state runs on over the borders of packed sequences."""
    if cu_seqlens is None:
        return rule(q, k, v, initial_state=initial_state, **call)
    if len(cu_seqlens) == 1:
        return rule(q, k, v, cu_seqlens=cu_seqlens, initial_state=initial_state, **call)
    first = None if initial_state is None else initial_state[:1]
    result = rule(q, k, v, initial_state=first, **call)
    return result._replace(final_state=result.final_state.expand(len(cu_seqlens) - 1, -1, -1, -1))


@op_rejected_by("any_split_is_one_pass", rule)
def starts_anew(q, k, v, *, initial_state=None, **call):
    """The initial state is ignored."""
    return rule(q, k, v, **call)


@op_rejected_by("is_causal", rule)
def beta_of_the_next(q, k, v, *, beta, **call):
    """The write strength is that of the next token."""
    return rule(q, k, v, beta=beta.roll(-1, 1), **call)


@op_rejected_by("gradients_are_right", rule)
def no_gradient_of_the_residual(q, k, v, **call):
    """The residual carries no gradient to the keys."""
    result = rule(q, k, v, **call)
    if result.residual is None:
        return result
    rest = rule(q, k.detach(), v, **call).residual
    return result._replace(residual=rest)


@op_rejected_by("score_is_the_surprise_of_the_residual", rule)
def score_of_the_values(q, k, v, *, metric=None, **call):
    """The score is that of a memory that predicts nothing."""
    result = rule(q, k, v, metric=metric, **call)
    return (
        result
        if metric is None
        else result._replace(score=ops.surprise(v.detach(), v.detach(), metric=metric))
    )


@op_rejected_by("ignores_autocast", rule)
def autocast_inside(q, k, v, **call):
    """A product that autocast rounds."""
    result = rule(q, k, v, **call)
    eye = torch.eye(v.shape[-1], dtype=result.out.dtype)
    return result._replace(out=(result.out.float() @ eye.float()).to(result.out.dtype))


@op_rejected_by("nothing_given_changes", rule)
def decays_in_place(q, k, v, *, initial_state=None, **call):
    """The initial state is overwritten with the final one."""
    result = rule(q, k, v, initial_state=initial_state, **call)
    if initial_state is not None:
        initial_state.data.copy_(result.final_state.detach())
    return result


# attention


@op_rejected_by("float64_is_the_reference", attention)
def one_query_too_long(q, k, v, evict_at, **call):
    """The query at evict_at still sees the token."""
    return attention(q, k, v, torch.where(evict_at < NEVER, evict_at + 1, evict_at), **call)


@op_rejected_by("float64_is_the_reference", attention)
def not_itself(
    q, k, v, evict_at, *, query_position=None, key_position=None, cu_seqlens=None, **call
):
    """A query does not see its own token."""
    own = own_positions(k, key_position, cu_seqlens)
    if cu_seqlens is not None:
        return attention(q, k, v, evict_at, cu_seqlens=cu_seqlens, **call)
    return attention(
        q, k, v, evict_at, query_position=query_position, key_position=own.int() + 1, **call
    )


@op_rejected_by("float64_is_the_reference", attention)
def groups_by_modulo(q, k, v, evict_at, **call):
    """Query head h reads key/value head h modulo Hkv."""
    group = q.shape[2] // k.shape[2]
    mixed = q.unflatten(2, (group, -1)).transpose(2, 3).flatten(2, 3)
    result = attention(mixed, k, v, evict_at, **call)
    return type(result)(
        *(x.unflatten(2, (-1, group)).transpose(2, 3).flatten(2, 3) for x in result)
    )


@op_rejected_by("float64_is_the_reference", attention)
def stale_lengths(q, k, v, evict_at, *, key_lengths=None, **call):
    """The lengths of the last call: one key too many."""
    if key_lengths is not None:
        key_lengths = (key_lengths + 1).clamp(max=k.shape[1])
    return attention(q, k, v, evict_at, key_lengths=key_lengths, **call)


@op_rejected_by("float64_is_the_reference", attention)
def bias_without_gradient(q, k, v, evict_at, *, logit_bias=None, **call):
    """The gradient of the logit bias is dropped."""
    return attention(
        q, k, v, evict_at, logit_bias=None if logit_bias is None else logit_bias.detach(), **call
    )


@op_rejected_by("float64_is_the_reference", attention)
def lse_to_base_two(q, k, v, evict_at, **call):
    """The log-sum-exp is to the base of two."""
    result = attention(q, k, v, evict_at, **call)
    return result._replace(lse=result.lse / 0.6931471805599453)


@op_rejected_by("float32_is_the_reference", attention)
def scale_in_half(q, k, v, evict_at, *, scale=None, **call):
    """The scale is rounded to bfloat16."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention(q, k, v, evict_at, scale=float(torch.tensor(scale).bfloat16()), **call)


@op_rejected_by("bfloat16_is_the_reference", attention)
def values_in_eight_bits(q, k, v, evict_at, **call):
    """Values are rounded more than their dtype asks for."""
    return attention(q, k, v + ((v * 8).round() / 8 - v).detach(), evict_at, **call)


@op_rejected_by("gradients_are_right", attention)
def gradient_of_k_halved(q, k, v, evict_at, **call):
    """Half of the gradient of the keys."""
    return attention(q, 0.5 * k + 0.5 * k.detach(), v, evict_at, **call)


@op_rejected_by("is_always_finite", attention)
def nan_on_empty(q, k, v, evict_at, **call):
    """A softmax over nothing is NaN."""
    result = attention(q, k, v, evict_at, **call)
    return result._replace(
        out=result.out.masked_fill((result.lse == float("-inf"))[..., None], float("nan"))
    )


@op_rejected_by("seeing_nothing_is_zero", attention)
def mean_of_nothing(q, k, v, evict_at, **call):
    """A query that sees nothing reads the mean of all values."""
    result = attention(q, k, v, evict_at, **call)
    if not v.numel():
        return result
    mean = v.mean((1, 2), keepdim=True)
    return result._replace(
        out=torch.where((result.lse == float("-inf"))[..., None], mean, result.out)
    )


@op_rejected_by("unseen_keys_do_not_leak", attention)
def zero_times_garbage(q, k, v, evict_at, **call):
    """Masked keys are multiplied by zero, which NaN survives."""
    result = attention(q, k, v, evict_at, **call)
    return result._replace(out=result.out + 0 * v.sum((1, 2))[:, None, None])


@op_rejected_by("same_call_same_bits", attention)
def atomic_sums(q, k, v, evict_at, **call):
    """A sum whose order changes from call to call."""
    result = attention(q, k, v, evict_at, **call)
    return result._replace(
        out=result.out * (1 + 1e-15 * torch.rand(()).double()).to(q.dtype) + 1e-9 * torch.rand(())
    )


@op_rejected_by("reads_no_unwritten_memory", attention)
def adds_to_empty(q, k, v, evict_at, **call):
    """Adds zero times memory that nobody wrote."""
    result = attention(q, k, v, evict_at, **call)
    return result._replace(out=result.out + 0 * torch.empty_like(result.out))


@op_rejected_by("compiled_is_eager", attention)
def looks_at_values(q, k, v, evict_at, **call):
    """Takes a shortcut where nothing is stored."""
    result = attention(q, k, v, evict_at, **call)
    return (
        result if bool((evict_at > 0).any()) else result._replace(out=torch.zeros_like(result.out))
    )


@op_rejected_by("float16_is_the_reference", ops.paged_attention)
def paged_off_by_one(q, slabs, block_table, *, query_position):
    """The query at evict_at still sees the token."""
    later = [
        slab._replace(evict_at=torch.where(slab.evict_at < NEVER, slab.evict_at + 1, NEVER))
        for slab in slabs
    ]
    return ops.paged_attention(q, later, block_table, query_position=query_position)


# the others


@op_rejected_by("is_always_finite", ops.surprise)
def cosine_without_a_guard(residual, v, *, metric="cosine"):
    """0 / 0 where the prediction or the value is zero."""
    if metric != "cosine":
        return ops.surprise(residual, v, metric=metric)
    wide = torch.promote_types(v.dtype, torch.float32)
    p, v = (v - residual).to(wide), v.to(wide)
    return 1 - (p * v).sum(-1) / (p.norm(dim=-1) * v.norm(dim=-1))


@op_rejected_by("float32_is_the_reference", ops.select_threshold)
def above(score, tau, **call):
    """Compares with > where it should be >=."""
    return ops.select_threshold(torch.where(score == tau, -float("inf"), score), tau, **call)


@op_rejected_by("raising_tau_never_keeps_more", ops.select_threshold)
def near_tau(score, tau, **call):
    """Stores what is near the threshold."""
    return ops.select_threshold(-(score - tau).abs(), -0.3, **call)


@op_rejected_by("float64_is_the_reference", ops.select_topk)
def later_ties_win(score, k, **call):
    """Equal scores: the later token stays."""
    order = torch.arange(score.shape[1], dtype=score.dtype)[None, :, None]
    return ops.select_topk(score + 1e-6 * order, k, **call)


@op_rejected_by("is_causal", ops.select_topk)
def global_topk(score, k, *, position=None, cu_seqlens=None):
    """The k largest of the whole sequence."""
    ends = ops.select_topk(score, k, position=position, cu_seqlens=cu_seqlens)
    own = ops.select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
    return torch.where(ends == NEVER, ends, own)


@op_rejected_by("packed_is_one_by_one", ops.select_topk)
def one_ranking(score, k, *, position=None, cu_seqlens=None):
    """Packed sequences compete with each other."""
    if cu_seqlens is not None and position is None:
        position = (ops.select_window(score, 0, cu_seqlens=cu_seqlens)).int()
    return ops.select_topk(score, k, position=position)


@op_rejected_by("float64_is_the_reference", ops.select_window)
def window_off_by_one(score, width, **call):
    """A window of one token more."""
    return ops.select_window(score, width + 1, **call)


@op_rejected_by("float64_is_the_reference", ops.select_first)
def first_of_the_row(score, n, *, position=None, cu_seqlens=None):
    """The first n of a packed row, not of every sequence."""
    own = ops.select_window(score, 0, position=position, cu_seqlens=cu_seqlens)
    kept = ops.select_first(score, n, position=position) == NEVER
    return torch.where(kept & (own >= 0), NEVER, own)


@op_rejected_by("float64_is_the_reference", ops.compact)
def counts_of_the_row(evict_at, **call):
    """Lengths are those of the packed row."""
    listed = ops.compact(evict_at, **call)
    total = listed.lengths.sum(0, keepdim=True).int().expand_as(listed.lengths).contiguous()
    return listed._replace(lengths=total)


@op_rejected_by("nothing_given_changes", ops.compact)
def clamps_in_place(evict_at, **call):
    """Lifetimes are clamped in place."""
    evict_at.clamp_(max=2**30)
    return ops.compact(evict_at, **call)


@op_rejected_by("is_causal", rule)
def gradient_through_the_end(q, k, v, **call):
    """The mean of the values has no value and a gradient."""
    mean = v.mean(1, keepdim=True) if v.shape[1] else v
    return rule(q, k, v + mean - mean.detach(), **call)
