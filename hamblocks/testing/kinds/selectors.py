"""Checks of selectors: `selector(score, ledger, position=, cu_seqlens=) -> Selection`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hamblocks import contracts
from hamblocks.controllers import step_controllers
from hamblocks.ledger import EMPTY
from hamblocks.protocols import Selection
from hamblocks.selectors import AllOf, AnyOf, Threshold, TopK, Window, is_causal, start
from hamblocks.state import leaves
from hamblocks.testing.budget import assert_bits
from hamblocks.testing.check import Check, Options
from hamblocks.testing.common import SPLIT, cases_of, no_module
from hamblocks.testing.comparing import (
    assert_never_longer,
    assert_reads_what_was_written,
    assert_twice,
    compiled,
    prefixed,
    reload,
    unchanged,
)
from hamblocks.testing.inputs.draw import pieces
from hamblocks.testing.inputs.parts import PartInputs, part_inputs
from hamblocks.testing.inputs.scores import ScorePieces, Scores, score_pieces, scores
from hamblocks.testing.laws import composes
from hamblocks.testing.subjects import made
from hamblocks_ops import NEVER


def ready(part: Any) -> Any:
    """A copy of the selector in eval mode and float32, the dtype of scores in every model."""
    return made(part, None, torch.float32, 0)


class Step(NamedTuple):
    """One piece of a batch of sequences, and what the selector decided.

    Attributes:
        begin: int64 `[N]`, position of the first token of each sequence's piece.
        end: int64 `[N]`, position after the last token.
        real: bool `[N, T]`, which tokens of the padded piece are not padding.
        listed: int32 `[N, L, H]`, positions in the ledger before the call; None: no ledger.
        selection: the selector's result.
    """

    begin: Tensor
    end: Tensor
    real: Tensor
    listed: Tensor | None
    selection: Selection


def stream(selector: Any, case: ScorePieces) -> Iterator[Step]:
    """Calls a selector piece by piece.

    Pieces that are shorter than the longest one are padded with tokens at position -1. Padding has
    a high score, so that a selector that does not ignore it fails.
    """
    score = case.score
    sequences, longest, heads = score.shape
    ledger = start(selector, sequences, heads)
    for begin, end in pairwise(case.ends):
        if not bool((end > begin).any()):
            continue  # parts are never called without tokens
        index = begin[:, None] + torch.arange(int((end - begin).max()))
        real = index < end[:, None]
        position = torch.where(real, index, EMPTY).to(torch.int32)
        token = index.clamp(max=max(longest - 1, 0))[..., None].expand(-1, -1, heads)
        piece = score.gather(1, token)
        listed = None if ledger is None else ledger.position.clone()
        selection = selector(piece.masked_fill(~real[..., None], 9.0), ledger, position=position)
        yield Step(begin, end, real, listed, selection)
        ledger = selection.ledger


def _decided(selector: Any, case: ScorePieces, *, padding: bool = True) -> dict[str, Tensor]:
    """Lifetimes in one pass and piece by piece, with or without the lifetimes of padding."""
    steps = ((step.selection.evict_at, step.real) for step in stream(selector, case))
    pieces_of = [evict_at if padding else evict_at[real] for evict_at, real in steps]
    return {"one pass": selector(case.score).evict_at} | {
        f"piece {i}": x for i, x in enumerate(pieces_of)
    }


def _has_its_shapes(part: Any, case: Scores, _options: Options) -> None:
    """Lifetimes are int32 with the shape of `score`."""
    selector, call = ready(part), case.tensors()
    call.pop("position", None)
    selection = selector(**call)
    contracts.check_selection(selection, call["score"])
    shape, dtype = selection.evict_at.shape, selection.evict_at.dtype
    assert shape == call["score"].shape, (
        f"evict_at: shape {list(shape)}, expected {list(call['score'].shape)}"
    )
    assert dtype == torch.int32, f"evict_at: {dtype}, expected torch.int32"


def _is_causal(part: Any, case: ScorePieces, _options: Options) -> None:
    """Scores from position t on change no lifetime before t, as far as queries before t can see.

    In training mode too.
    """
    selector, score = ready(part), case.score
    other = replace(case, seed=case.seed + 1).score
    for t in range(score.shape[1]):
        changed = torch.cat([score[:, :t], other[:, t:]], 1)
        before, after = (selector(x).evict_at[:, :t].clamp(max=t) for x in (score, changed))
        with prefixed(f"lifetimes of tokens before {t} changed with the scores from {t} on"):
            assert_bits({"evict_at": after}, {"evict_at": before})
    if isinstance(part, nn.Module):
        t = score.shape[1] // 2
        changed = torch.cat([score[:, :t], other[:, t:]], 1)
        # a copy for every call, which may count scores, and the same random numbers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            before = ready(part).train()(score).evict_at[:, :t].clamp(max=t)
            torch.manual_seed(case.seed)
            after = ready(part).train()(changed).evict_at[:, :t].clamp(max=t)
        with prefixed(
            f"in training mode, lifetimes before {t} changed with the scores from {t} on"
        ):
            assert_bits({"evict_at": after}, {"evict_at": before})


def _any_split_is_one_pass(part: Any, case: ScorePieces, _options: Options) -> None:
    """After every piece, the lifetimes are those of one pass over the tokens so far."""
    selector, score = ready(part), case.score
    evict_at = torch.full(score.shape, EMPTY, dtype=torch.int32)
    for step in stream(selector, case):
        lowered = step.selection.lowered
        if lowered is not None:
            for n, slot, head in (lowered.position != EMPTY).nonzero().tolist():
                token = int(lowered.position[n, slot, head])
                evict_at[n, token, head] = lowered.evict_at[n, slot, head]
        for n in range(len(score)):
            end = int(step.end[n])
            evict_at[n, int(step.begin[n]) : end] = step.selection.evict_at[n, step.real[n]]
            with prefixed(f"sequence {n} after {end} tokens"):
                whole = selector(score[n : n + 1, :end]).evict_at[0]
                assert_bits({"evict_at": evict_at[n, :end]}, {"evict_at": whole})


def _only_lowers(part: Any, case: ScorePieces, _options: Options) -> None:
    """Lifetimes are only lowered, never below now; `lowered` has the positions of the ledger."""
    selector = ready(part)
    evict_at = torch.full(case.score.shape, EMPTY, dtype=torch.int32)
    for step in stream(selector, case):
        lowered = step.selection.lowered
        if lowered is not None:
            with prefixed("lowered.position differs from the positions in the ledger"):
                assert step.listed is not None, "the ledger was None"
                assert_bits({"position": lowered.position}, {"position": step.listed})
            for n, slot, head in (lowered.position != EMPTY).nonzero().tolist():
                token, now = int(lowered.position[n, slot, head]), int(step.begin[n])
                old, new = int(evict_at[n, token, head]), int(lowered.evict_at[n, slot, head])
                assert new == old or now <= new < old, (
                    f"token {token} of sequence {n}: lifetime {old} became {new} at position {now}"
                )
                evict_at[n, token, head] = new
        for n in range(len(evict_at)):
            new_tokens = slice(int(step.begin[n]), int(step.end[n]))
            evict_at[n, new_tokens] = step.selection.evict_at[n, step.real[n]]


def _ledger_does_not_grow(part: Any, case: ScorePieces, _options: Options) -> None:
    """A ledger lists positions in ascending order, and its size does not grow with the sequence."""
    selector = ready(part)
    sizes = [x.shape for x in leaves(start(selector, len(case.lengths), case.heads))]
    for step in stream(selector, case):
        got = [x.shape for x in leaves(step.selection.ledger)]
        assert got == sizes, (
            f"ledger: shapes {[list(x) for x in got]}, expected those of the empty ledger "
            f"{[list(x) for x in sizes]}"
        )
        position = step.selection.ledger.position
        assert position.dtype == torch.int32, (
            f"ledger.position: {position.dtype}, expected torch.int32"
        )
        assert bool((position.diff(dim=1)[position[:, 1:] != EMPTY] > 0).all()), (
            "ledger.position: not ascending"
        )


def _packed_is_one_by_one(part: Any, case: Scores, _options: Options) -> None:
    """Packed sequences get the lifetimes that each gets alone."""
    selector, call = ready(part), case.tensors()
    score = call["score"]
    packed = selector(score, cu_seqlens=call["cu_seqlens"]).evict_at
    alone = [selector(score[:, own]).evict_at for own in pieces(case.packed or ())]
    with prefixed("a sequence alone gets other lifetimes than packed"):
        assert_bits({"evict_at": packed}, {"evict_at": torch.cat([packed[:, :0], *alone], 1)})


def _rows_are_independent(part: Any, case: Scores, _options: Options) -> None:
    """The sequences of a batch get the lifetimes that each gets alone."""
    selector, score = ready(part), case.tensors()["score"]
    together = selector(score).evict_at
    alone = [selector(one).evict_at for one in score.split(1)]
    with prefixed("a sequence alone gets other lifetimes than in a batch"):
        assert_bits({"evict_at": together}, {"evict_at": torch.cat([together[:0], *alone])})


def _padding_is_ignored(part: Any, case: Scores, _options: Options) -> None:
    """Padding at position -1 changes no lifetime of the tokens."""
    selector, score = ready(part), case.tensors()["score"]
    batch, tokens, heads = score.shape
    position = torch.arange(tokens, dtype=torch.int32).expand(batch, tokens)
    padding = score.new_full((batch, 2, heads), 9.0)
    nowhere = torch.full((batch, 2), EMPTY, dtype=torch.int32)
    plain = selector(score, start(selector, batch, heads), position=position).evict_at
    for name, order in (("behind", (0, 1)), ("before", (1, 0))):
        padded = torch.cat([(score, padding)[i] for i in order], 1)
        where = torch.cat([(position, nowhere)[i] for i in order], 1)
        got = selector(padded, start(selector, batch, heads), position=where).evict_at
        real = slice(0, tokens) if name == "behind" else slice(2, None)
        with prefixed(f"padding {name} the tokens changed their lifetimes"):
            assert_bits({"evict_at": got[:, real]}, {"evict_at": plain})


def _same_call_same_bits(part: Any, case: ScorePieces, _options: Options) -> None:
    """The same call twice gives the same lifetimes, whatever the random state, also for ties."""
    assert_twice(lambda: _decided(ready(part), case))


def _nothing_given_changes(part: Any, case: ScorePieces, _options: Options) -> None:
    """A call changes no score, position or ledger and, in eval mode, nothing in the selector."""
    selector, score = ready(part), case.score
    sequences, tokens, heads = score.shape
    t = tokens // 2
    position = torch.arange(tokens, dtype=torch.int32).expand(sequences, tokens).contiguous()
    empty = start(selector, sequences, heads)
    ledger = selector(score[:, :t], empty, position=position[:, :t]).ledger
    given = {"score": score, "position": position}
    given |= {f"ledger {i}": x for i, x in enumerate(leaves(ledger))}
    if isinstance(selector, nn.Module):
        given |= dict(selector.state_dict())
    with unchanged(given):
        selector(score[:, t:], ledger, position=position[:, t:])


def _reads_no_unwritten_memory(part: Any, case: ScorePieces, _options: Options) -> None:
    """Lifetimes do not depend on what `torch.empty` returns."""
    assert_reads_what_was_written(lambda: _decided(ready(part), case, padding=False))


def _or_and_and_are_a_lattice(part: Any, case: ScorePieces, _options: Options) -> None:
    """`|` and `&` with other selectors are commutative and idempotent, and absorb each other."""
    score = case.score
    for other in (Window(3), TopK(2), Threshold(0.25)):
        a, b = ready(part), other
        alone = a(score).evict_at
        laws = {
            "a | b = b | a": (AnyOf(a, b), AnyOf(b, a)),
            "a & b = b & a": (AllOf(a, b), AllOf(b, a)),
            "a | a = a": (AnyOf(a, a), a),
            "a & a = a": (AllOf(a, a), a),
            "a | (a & b) = a": (AnyOf(a, AllOf(a, b)), a),
            "a & (a | b) = a": (AllOf(a, AnyOf(a, b)), a),
        }
        for law, (left, right) in laws.items():
            with prefixed(f"{law} with b = {other}"):
                assert_bits({"evict_at": left(score).evict_at}, {"evict_at": right(score).evict_at})
        assert bool((AnyOf(a, b)(score).evict_at >= alone).all()), "a | b keeps less than a"
        assert bool((AllOf(a, b)(score).evict_at <= alone).all()), "a & b keeps more than a"
        if isinstance(a, nn.Module) and hasattr(a, "__or__"):
            with prefixed("the operators | and & are AnyOf and AllOf"):
                assert_bits(
                    {"evict_at": (a | b)(score).evict_at}, {"evict_at": AnyOf(a, b)(score).evict_at}
                )
                assert_bits(
                    {"evict_at": (a & b)(score).evict_at}, {"evict_at": AllOf(a, b)(score).evict_at}
                )


def thresholds(part: Any) -> list[Any]:
    """The modules of a selector, or the selector itself, that have `set_threshold`."""
    inside = part.modules() if isinstance(part, nn.Module) else [part]
    return [one for one in inside if hasattr(one, "set_threshold")]


def at(part: Any, tau: float) -> Any:
    """A copy of the selector with all its thresholds at tau."""
    selector = ready(part)
    for one in thresholds(selector):
        one.set_threshold(tau)
    return selector


def _raising_tau_never_keeps_more(part: Any, case: ScorePieces, _options: Options) -> None:
    """On the same scores, a higher threshold keeps no token longer."""
    kept = [
        at(part, tau)(case.score).evict_at for tau in (-math.inf, -1.0, 0.0, 0.25, 0.5, math.inf)
    ]
    assert_never_longer(kept)


def _threshold_is_reached_by_equal_scores(part: Any, case: ScorePieces, _options: Options) -> None:
    """Tokens with score >= tau are kept for good, at -inf all of them, but at +inf none."""
    score = case.score
    score = score.masked_fill(score.isnan(), 0.5)
    position = torch.arange(score.shape[1])[None, :, None]
    for tau in [-math.inf, math.inf, *score.flatten()[:4].tolist()]:
        kept = at(part, tau)(score).evict_at
        right = torch.where((score >= tau) & (tau < math.inf), NEVER, position).to(torch.int32)
        with prefixed(f"at tau = {tau}"):
            assert_bits({"evict_at": kept}, {"evict_at": right})


def _state_dict_is_all_there_is(part: Any, case: ScorePieces, _options: Options) -> None:
    """A copy that loads the state dict of a trained selector makes the same decisions."""
    selector, other = copy.deepcopy(part).train(), ready(part)
    for _ in range(3):
        selector(case.score)
        step_controllers(selector)
    for number, one in enumerate(thresholds(selector)):
        one.set_threshold(1.5 - number / 8)
    reload(selector, other)
    with prefixed("a copy that loaded the state dict makes other decisions"):
        assert_bits(
            {"evict_at": other(case.score).evict_at},
            {"evict_at": selector.eval()(case.score).evict_at},
        )


def _compiled_is_eager(part: Any, case: ScorePieces, _options: Options) -> None:
    """`torch.compile(fullgraph=True)` gives the same lifetimes, with and without a ledger."""
    selector, score = ready(part), case.score
    sequences, tokens, heads = score.shape
    position = torch.arange(tokens, dtype=torch.int32).expand(sequences, tokens)
    calls = [((score,), {}), ((score, start(selector, sequences, heads)), {"position": position})]
    with compiled(selector) as fast:
        for args, more in calls:
            with prefixed("compiled and eager differ"):
                assert_bits(
                    {"evict_at": fast(*args, **more).evict_at},
                    {"evict_at": selector(*args, **more).evict_at},
                )


def _refuses_a_packed_batch_beside_a_ledger(
    part: Any, case: ScorePieces, _options: Options
) -> None:
    """`cu_seqlens` together with a ledger is a ValueError that names it: pieces come padded."""
    selector = ready(part)
    score, cu_seqlens = torch.zeros(1, 3, case.heads), torch.tensor([0, 3])
    try:
        selector(score, start(selector, 1, case.heads), cu_seqlens=cu_seqlens)
    except ValueError as error:
        if str(error).startswith("cu_seqlens"):
            return
        raise AssertionError(
            f"the error is {str(error)!r}, expected one about cu_seqlens"
        ) from error
    raise AssertionError("cu_seqlens together with a ledger was accepted")


def _works_in_a_layer(part: Any, case: PartInputs, _options: Options) -> None:
    """A HAMLayer with the selector is causal, and pieces of any size give what one pass gives."""
    composes("selector", part, case)


def _not_causal(part: Any, _options: Options) -> str | None:
    return None if is_causal(part) else "it says causal = False"


def _no_ledger(part: Any, _options: Options) -> str | None:
    if not is_causal(part):
        return "it says causal = False, so it is never run in pieces"
    return "it never revises a lifetime, so it has no ledger" if start(part, 1, 1) is None else None


def why_not_monotone(part: Any) -> str | None:
    """Why a higher threshold may keep a token longer; None if it may not."""
    inside = part.modules() if isinstance(part, nn.Module) else [part]
    if all(getattr(one, "monotone", True) for one in inside):
        return None
    return "it says monotone = False: what it refuses leaves places to others"


def _not_monotone(part: Any, _options: Options) -> str | None:
    return why_not_monotone(part) if thresholds(part) else "it has no threshold to set"


def _no_plain_threshold(part: Any, _options: Options) -> str | None:
    plain = hasattr(part, "set_threshold") or hasattr(
        getattr(part, "controller", None), "set_threshold"
    )
    return None if plain else "it is no plain threshold"


LONG = ScorePieces((16, 9), tuple((t, t, 0) for t in range(16)))
RAGGED = ScorePieces((16, 0, 3), ((5, 0, 0), (5, 0, 3), (11, 0, 3)), 1, "normal", 1)
EVERY_KIND = tuple(
    ScorePieces((8, 5), ((4, 2, 0),), 2, kind) for kind in ("mixed", "constant", "near", "infinite")
)
TWO_BLOCKS = ScorePieces((150,), ((70, 0, 0), (133, 0, 0)), 1, "normal")
"""More tokens than a selector that works in blocks of 16, 32, 64 or 128 takes at a time."""


def _pieces(_options: Options) -> Any:
    lengths = st.lists(st.integers(0, 16), min_size=1, max_size=3).map(tuple)
    return score_pieces(lengths=lengths.filter(any))


def _scores(**fixed: Any) -> Any:
    """Strategy of scores of at least one token, since parts are never called without tokens."""
    return lambda _options: scores(empty_rows=False, **fixed).filter(lambda case: case.has_tokens)


def _check(
    name: str,
    body: Any,
    cases: Any = _pieces,
    edges: Any = (LONG, RAGGED, *EVERY_KIND),
    **more: Any,
) -> Check:
    found = edges if callable(edges) else lambda _options: edges
    return Check(f"check_selector_{name}", "selector", body, cases, found, **more)


CHECKS = [
    _check(
        "has_its_shapes",
        _has_its_shapes,
        _scores(),
        (Scores(tokens=1, heads=1), Scores(packed=(0, 2, 0))),
    ),
    _check("is_causal", _is_causal, applies=_not_causal),
    _check(
        "any_split_is_one_pass",
        _any_split_is_one_pass,
        edges=(LONG, RAGGED, *EVERY_KIND, TWO_BLOCKS),
        applies=_not_causal,
    ),
    _check("only_lowers", _only_lowers, applies=_no_ledger),
    _check("ledger_does_not_grow", _ledger_does_not_grow, applies=_no_ledger),
    _check(
        "packed_is_one_by_one",
        _packed_is_one_by_one,
        _scores(packed=st.lists(st.integers(0, 9), max_size=4).map(tuple)),
        (Scores(packed=(0, 5, 0, 0, 9, 1, 0), kind="ties"),),
    ),
    _check(
        "rows_are_independent",
        _rows_are_independent,
        _scores(packed=None, batch=st.integers(1, 3)),
        (Scores(tokens=9, kind="ties", batch=3),),
    ),
    _check(
        "padding_is_ignored",
        _padding_is_ignored,
        _scores(packed=None, batch=st.integers(1, 2)),
        (Scores(tokens=9, kind="ties"),),
        applies=_not_causal,
    ),
    _check("same_call_same_bits", _same_call_same_bits, applies=_not_causal, share=2),
    _check("nothing_given_changes", _nothing_given_changes, applies=_not_causal, share=2),
    _check("reads_no_unwritten_memory", _reads_no_unwritten_memory, applies=_not_causal, share=2),
    _check("or_and_and_are_a_lattice", _or_and_and_are_a_lattice, share=2),
    _check("raising_tau_never_keeps_more", _raising_tau_never_keeps_more, applies=_not_monotone),
    _check(
        "threshold_is_reached_by_equal_scores",
        _threshold_is_reached_by_equal_scores,
        applies=_no_plain_threshold,
    ),
    _check(
        "state_dict_is_all_there_is", _state_dict_is_all_there_is, None, (LONG,), applies=no_module
    ),
    _check(
        "compiled_is_eager",
        _compiled_is_eager,
        None,
        (ScorePieces((6, 6)),),
        applies=_not_causal,
        slow=True,
    ),
    _check(
        "refuses_a_packed_batch_beside_a_ledger",
        _refuses_a_packed_batch_beside_a_ledger,
        None,
        (LONG,),
        applies=_no_ledger,
    ),
    _check(
        "works_in_a_layer",
        _works_in_a_layer,
        cases_of(part_inputs),
        SPLIT,
        applies=_not_causal,
        share=2,
    ),
]
