"""Checks of attention parts.

An attention part is called as `attention(q, keys) -> read`. If it has a method `prepare`, that is
called first, as `prepare(q, k, v, position=, state=, cu_seqlens=) -> q, k, v, state`. The checks
pass keys of whole sequences or keys of a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing.budget import assert_bits, assert_same
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import EDGES, cases_of, common, edges_of, first
from hamblocks.testing.comparing import prefixed
from hamblocks.testing.inputs.draw import Draw
from hamblocks.testing.inputs.parts import DIMS, PartInputs, part_inputs
from hamblocks.testing.subjects import AttentionSubject, Results

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _read(
    subject: AttentionSubject, inputs: dict[str, Tensor], changed: Change | None = None
) -> Results:
    """The read; `changed` is applied to the prepared q, k and v, which `prepare` may have mixed."""
    subject.changed = changed
    with torch.no_grad():
        results, _ = subject.run(inputs)
    subject.changed = None
    return results


def _unseen_tokens_do_not_leak(part: Any, case: PartInputs, _options: Options) -> None:
    """Keys, values and biases of tokens that were never stored do not change the read."""
    subject = AttentionSubject(part, case)
    inputs = subject.inputs
    unseen = inputs["evict_at"] <= inputs["position"][..., None]
    other = subject.drawn(replace(case, seed=case.seed + 1))
    biased = dict(inputs)
    if "logit_bias" in inputs:
        biased["logit_bias"] = torch.where(unseen, 100 * other["logit_bias"], inputs["logit_bias"])

    def changed(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return given | {
            name: torch.where(unseen[..., None], 100 * other[name], given[name])
            for name in ("k", "v")
        }

    with prefixed("tokens that were never stored changed the read"):
        assert_same(
            _read(subject, biased, changed), _read(subject, inputs), lambda: _read(subject, inputs)
        )


def _evicted_tokens_do_not_leak(part: Any, case: PartInputs, _options: Options) -> None:
    """Query t does not read a token with evict_at <= t: its key and value change no later read."""
    subject = AttentionSubject(part, case)
    if case.tokens == 0:
        return
    inputs = subject.inputs
    j = min(case.cuts[0], case.tokens - 1)
    until = (
        inputs["position"][:, j, None]
        + 1
        + Draw(case.seed).integers(0, 4, inputs["evict_at"][:, j].shape)
    ).int()
    inputs["evict_at"][:, j] = until
    token = (torch.arange(case.tokens) == j)[:, None, None]

    def changed(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return given | {
            name: torch.where(token, 3 - 2 * given[name], given[name]) for name in ("k", "v")
        }

    group = case.dims.num_heads // case.dims.num_kv_heads
    gone = (inputs["position"][..., None] >= until[:, None]).repeat_interleave(group, 2)[..., None]

    def later(change: Change | None = None) -> Results:
        return {"read": _read(subject, inputs, change)["read"] * gone}

    with prefixed(
        f"the token at position {j} is still read after its eviction at {until.flatten().tolist()}"
    ):
        assert_same(later(changed), later(), later)


def _stored_tokens_are_seen(part: Any, case: PartInputs, _options: Options) -> None:
    """Query t reads every token with position <= t < evict_at, its own included.

    The read depends on the logit bias too, through which a gate with weights learns.
    """
    subject = AttentionSubject(part, case)
    prepared: list[Tensor] = []

    def tracked(given: dict[str, Tensor]) -> dict[str, Tensor]:
        prepared.append(given["v"].detach().clone().requires_grad_())
        return given | {"v": prepared[-1]}

    subject.changed = tracked
    bias = subject.inputs.get("logit_bias")
    if bias is not None:
        bias.requires_grad_()
    read, v = subject.run(subject.inputs)[0]["read"], prepared[-1]
    position, evict_at = subject.inputs["position"], subject.inputs["evict_at"]
    group = case.dims.num_heads // case.dims.num_kv_heads
    some = False  # a query sees two tokens: a bias of one alone changes no softmax
    for t in range(case.tokens):
        (grad,) = torch.autograd.grad(
            read[:, t].unflatten(1, (-1, group)).sin().sum(),
            v,
            retain_graph=True,
            allow_unused=True,
        )
        seen = (position[..., None] <= t) & (t < evict_at)
        some |= bool((seen.sum(1) > 1).any())
        touched = torch.zeros_like(seen) if grad is None else grad.ne(0).any(-1)
        missed = (seen & ~touched).nonzero().tolist()
        assert not missed, (
            f"query {t} does not read the token [sequence, position, head] = {missed[0]}, "
            "which it sees"
        )
    if bias is not None and some:
        (grad,) = torch.autograd.grad(read.sin().sum(), bias, allow_unused=True)
        reached = grad is not None and bool(grad.any())
        assert reached, (
            "logit_bias: it does not reach the read, so a gate with weights never learns"
        )


def _heads_are_grouped(part: Any, case: PartInputs, _options: Options) -> None:
    """Query head h reads key/value head h // (H // Hkv), and no other."""
    subject = AttentionSubject(part, case)
    heads, kv_heads = case.dims.num_heads, case.dims.num_kv_heads
    group = heads // kv_heads
    for changing in range(kv_heads):
        changed = dict(subject.inputs)
        for name in ("k", "v"):
            changed[name] = subject.inputs[name].clone()
            changed[name][:, :, changing] = 3 - 2 * changed[name][:, :, changing]
        others = [h for h in range(heads) if h // group != changing]

        def elsewhere(inputs: dict[str, Tensor], others: list[int] = others) -> Results:
            return {"read": _read(subject, inputs)["read"][:, :, others]}

        with prefixed(f"key/value head {changing} is read by a query head of another group"):
            assert_same(
                elsewhere(changed), elsewhere(subject.inputs), lambda: elsewhere(subject.inputs)
            )


def _seeing_nothing_is_zero(part: Any, case: PartInputs, _options: Options) -> None:
    """Where nothing is stored the read and its gradients are 0, not NaN."""
    subject = AttentionSubject(part, case)
    nothing = (
        subject.inputs["position"][..., None].expand(subject.inputs["evict_at"].shape).contiguous()
    )
    leaves = {
        name: x.clone().requires_grad_(x.is_floating_point())
        for name, x in (subject.inputs | {"evict_at": nothing}).items()
    }
    read = subject.run(leaves)[0]["read"]
    assert not bool((read != 0).any()), (
        f"read: {float(read[read != 0][0])} where nothing is stored, expected 0"
    )
    wanted = [x for x in leaves.values() if x.requires_grad]
    if read.requires_grad:
        for grad in torch.autograd.grad(read.sum(), wanted, allow_unused=True):
            assert grad is None or not bool((grad != 0).any()), (
                "a gradient is not 0 where nothing is stored"
            )


def _one_lifetime_serves_all_heads(part: Any, case: PartInputs, _options: Options) -> None:
    """Lifetimes and biases [B, T, 1] hold for every head."""
    subject = AttentionSubject(part, case)
    one = dict(subject.inputs)
    for name in ("evict_at", "logit_bias"):
        if name in one:
            one[name] = one[name][..., :1]
    kv_heads = case.dims.num_kv_heads
    every = one | {
        name: one[name].expand(-1, -1, kv_heads).contiguous()
        for name in ("evict_at", "logit_bias")
        if name in one
    }
    with prefixed("[B, T, 1] gives another result than the same values for every head"):
        assert_same(_read(subject, one), _read(subject, every), lambda: _read(subject, every))


def _padding_is_ignored(part: Any, case: PartInputs, _options: Options) -> None:
    """With a cache, tokens at position -1 are padding: they are neither read nor stored."""
    subject = AttentionSubject(part, case)

    @torch.no_grad()
    def alone() -> tuple[Results, Any]:
        return subject.run(subject.inputs, subject.start(case.batch))

    plain, cache = alone()
    padded = {
        name: torch.cat([x, x.new_full((case.batch, 2, *x.shape[2:]), 7)], 1)
        for name, x in subject.inputs.items()
    }
    padded["position"][:, case.tokens :] = -1
    with torch.no_grad():
        got, other = subject.run(padded, subject.start(case.batch))
    with prefixed("padding changed the reads"):
        assert_same({"read": got["read"][:, : case.tokens]}, plain, lambda: alone()[0])
    with prefixed("padding was stored"):
        assert_bits({"tokens": other[0].tokens}, {"tokens": cache[0].tokens})


def _looks_at_nothing(part: Any, options: Options) -> str | None:
    subject = AttentionSubject(
        part, PartInputs(dims=options.dims or DIMS[0], dtype=options.dtypes[0])
    )
    read = _read(subject, subject.inputs)["read"]
    return None if bool(read.any()) else "it reads nothing"


CASES = cases_of(part_inputs, bias=st.booleans())
CHECKS = [
    *common(AttentionSubject, bias=True),
    Check(
        "check_attention_unseen_tokens_do_not_leak",
        "attention",
        _unseen_tokens_do_not_leak,
        CASES,
        EDGES,
    ),
    Check(
        "check_attention_evicted_tokens_do_not_leak",
        "attention",
        _evicted_tokens_do_not_leak,
        CASES,
        EDGES,
    ),
    Check(
        "check_attention_stored_tokens_are_seen",
        "attention",
        _stored_tokens_are_seen,
        CASES,
        lambda options: [*EDGES(options), first(options, tokens=14, cuts=(9,), bias=True)],
        share=2,
        applies=_looks_at_nothing,
    ),
    Check(
        "check_attention_heads_are_grouped",
        "attention",
        _heads_are_grouped,
        CASES,
        edges_of({"dims": DIMS[2]}, {"dims": DIMS[3]}),
    ),
    Check(
        "check_attention_seeing_nothing_is_zero", "attention", _seeing_nothing_is_zero, CASES, EDGES
    ),
    Check(
        "check_attention_one_lifetime_serves_all_heads",
        "attention",
        _one_lifetime_serves_all_heads,
        CASES,
        EDGES,
    ),
    Check(
        "check_attention_padding_is_ignored",
        "attention",
        _padding_is_ignored,
        CASES,
        EDGES,
        share=2,
    ),
]
