"""The laws that parts of several kinds obey, each written once over a `Subject`.

A law is `law(kind, part, case)`: `kind` is the `Subject` class that knows how the part is called,
`case` the drawn sizes, numbers and seed. It raises an AssertionError where the part breaks it.
`common.py` turns laws into checks. The docstring of a law is the purpose that its check prints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hamblocks.state import HAMState, leaves
from hamblocks.testing.budget import assert_bits, assert_same
from hamblocks.testing.comparing import (
    assert_reads_what_was_written,
    assert_twice,
    by_token,
    compiled,
    differentiated,
    gradients_named,
    head,
    prefixed,
    reload,
    unchanged,
)
from hamblocks.testing.inputs.draw import borders, lay_out, pieces
from hamblocks.testing.inputs.parts import PartInputs
from hamblocks.testing.subjects import (
    LayerSubject,
    Results,
    Subject,
    layer_with,
    made,
    modules_of,
)

Law = Callable[[type[Subject], Any, PartInputs], None]


def has_its_shapes(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Every result has the shape and dtype that the protocol names."""
    subject = kind(part, case)
    results, _ = subject.run(subject.inputs)
    shapes = subject.shapes()
    for name, x in results.items():
        shape, dtype = shapes[name]
        assert isinstance(x, Tensor), f"{name}: {type(x).__name__}, expected a tensor"
        assert x.dim() == 2 + len(shape), (
            f"{name}: shape {list(x.shape)}, expected {2 + len(shape)} dimensions"
        )
        assert tuple(x.shape[:2]) == case.rows, (
            f"{name}: shape {list(x.shape)}, expected [B, T] = {list(case.rows)}"
        )
        fits = all(
            want is None or want == got for want, got in zip(shape, x.shape[2:], strict=True)
        )
        assert fits, f"{name}: shape {list(x.shape)}, expected {list(shape)} after [B, T]"
        assert dtype is None or x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}"
        # the head count of scores, biases and lifetimes is the part's choice among a few numbers
        _, heads, kv_heads, *_ = getattr(subject.part, "dims", None) or case.dims
        if name in ("score", "logit_bias", "evict_at") and subject.kind != "memory":
            right = {1, kv_heads, heads} if name == "score" else {1, kv_heads}
            assert x.shape[2] in right, (
                f"{name}: {x.shape[2]} heads, expected one of {sorted(right)}"
            )


def is_causal(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Changing inputs from position t on changes no result before t.

    In training mode too: a batch norm is causal in eval mode alone.
    """
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    other = subject.drawn(replace(case, seed=case.seed + 1))
    changed = {
        name: torch.cat([x[:, :t], other[name][:, t:]], 1) for name, x in subject.inputs.items()
    }

    def run(inputs: Mapping[str, Tensor]) -> Results:
        with torch.no_grad():
            return head(subject.run(inputs)[0], t)

    def trained(inputs: Mapping[str, Tensor]) -> Results:
        # a part of its own for every call, which may change buffers, and the same dropout
        own = kind(part, case)
        for module in modules_of(own.part):
            module.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            return head(own.run(inputs)[0], t)

    with prefixed(f"results before position {t} changed with the inputs from it on"):
        assert_same(run(changed), run(subject.inputs), lambda: run(subject.inputs))
        if 0 < t < case.tokens and modules_of(subject.part):
            with prefixed("in training mode"):
                before = trained(subject.inputs)
                assert_same(trained(changed), before, lambda: trained(subject.inputs))


def gradients_are_causal(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Results before position t have no gradient with respect to inputs from t on."""
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    _, gradients = differentiated(subject, subject.inputs, parts=[(slice(None), slice(0, t))])
    for name, grad in gradients.items():
        assert bool(grad.isfinite().all()), f"grad of {name}: not finite"
        later = grad[:, t:]
        assert not bool(later.any()), (
            f"grad of {name}: results before position {t} have gradient "
            f"{float(later.abs().max()):.3g} from it on"
        )


def rows_are_independent(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A batch gives what each of its batch rows gives alone, forward and backward."""
    subject = kind(part, case)

    def alone() -> Results:
        batch_rows = [
            gradients_named(
                *differentiated(subject, {name: x[n : n + 1] for name, x in subject.inputs.items()})
            )
            for n in range(case.batch)
        ]
        return {name: torch.cat([one[name] for one in batch_rows]) for name in batch_rows[0]}

    parts = [(slice(n, n + 1), slice(None)) for n in range(case.batch)]
    together = gradients_named(*differentiated(subject, subject.inputs, parts=parts))
    with prefixed("a batch row alone gives another result than in a batch"):
        assert_same(together, alone(), alone)


def packed_is_one_by_one(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Packed sequences, empty ones included, give what each gives alone, forward and backward."""
    subject = kind(part, case)
    assert case.packed is not None
    own = pieces(case.packed)
    cu_seqlens = borders(case.packed)

    def alone() -> Results:
        sequences = [
            gradients_named(*differentiated(subject, by_token(subject.inputs, where)))
            for where in own
            if where.stop > where.start or not any(case.packed or ())
        ]
        if not sequences:
            return gradients_named(*differentiated(subject, subject.inputs, cu_seqlens=cu_seqlens))
        return {name: torch.cat([one[name] for one in sequences], 1) for name in sequences[0]}

    parts = [(slice(None), where) for where in own]
    together = gradients_named(
        *differentiated(subject, subject.inputs, parts=parts, cu_seqlens=cu_seqlens)
    )
    with prefixed("a sequence alone gives another result than packed"):
        assert_same(together, alone(), alone)


def any_split_is_one_pass(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A sequence in pieces of any size, the state handed on, gives what one pass gives."""
    subject = kind(part, case)
    ends = case.borders

    @torch.no_grad()
    def whole() -> Results:
        return _until_each_end(subject.run(subject.inputs)[0], ends)

    with torch.no_grad():
        state, results_of_pieces = subject.start(case.batch), []
        for begin, end in pairwise(ends):
            if begin == end and subject.kind != "layer":
                continue  # only a layer is called without a token
            results, state = subject.run(by_token(subject.inputs, slice(begin, end)), state)
            if begin == end and case.tokens:
                continue  # an empty piece decides nothing, so its number of heads is undefined
            results_of_pieces.append(
                {n: x.clamp(max=end) if n == "evict_at" else x for n, x in results.items()}
            )
    got = {
        name: torch.cat([piece[name] for piece in results_of_pieces], 1)
        for name in results_of_pieces[0]
    }
    with prefixed(f"pieces that end at {ends[1:]} give another result than one pass"):
        assert_same(got, whole(), whole)


def _until_each_end(results: Results, ends: Sequence[int]) -> Results:
    """Cuts every lifetime to the end of the token's piece.

    A later piece may still lower a lifetime, so the piece itself can only know it as far as its own
    end.
    """
    if "evict_at" not in results:
        return results
    sizes = torch.tensor(ends).diff()
    known = torch.tensor(ends[1:]).repeat_interleave(sizes)[None, :, None]
    return results | {"evict_at": torch.minimum(results["evict_at"], known.to(torch.int32))}


def same_call_same_bits(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """The same call twice gives the same bits, forward and backward, whatever the random state."""
    subject = kind(part, case)
    assert_twice(lambda: gradients_named(*differentiated(subject, subject.inputs, weights=True)))


def nothing_given_changes(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A call changes neither its inputs nor its state, nor in eval mode parameters and buffers."""
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    if subject.kind != "layer":  # only a layer is called without a token
        t = max(1, min(t, case.tokens - 1))
    with torch.no_grad():
        _, state = subject.run(by_token(subject.inputs, slice(0, t)), subject.start(case.batch))
        kept = dict(subject.part.state_dict()) if isinstance(subject.part, nn.Module) else {}
        given = dict(subject.inputs) | {
            name: x for name, x in kept.items() if isinstance(x, Tensor)
        }
        # the cache is changed in place; the other states stay as they were
        tree = state
        if subject.kind == "attention":
            tree = state[1]
        elif isinstance(state, HAMState):
            tree = state.trees
        given |= {f"state {i}": x for i, x in enumerate(leaves(tree))}
        with unchanged(given):
            if t < case.tokens or subject.kind == "layer":
                subject.run(by_token(subject.inputs, slice(t, None)), state)
            subject.run(subject.inputs)


def strides_do_not_matter(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Inputs that are strided views give what contiguous ones give."""
    subject = kind(part, case)

    @torch.no_grad()
    def run(layout: str) -> Results:
        inputs = {
            n: lay_out(x, layout) if x.is_floating_point() else x.mT.contiguous().mT
            for n, x in subject.inputs.items()
        }
        return subject.run(inputs)[0]

    for layout in ("transposed", "strided"):
        with prefixed(f"{layout} inputs give another result than contiguous ones"):
            assert_same(run(layout), run("contiguous"), lambda: run("contiguous"))


def reads_no_unwritten_memory(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Results do not depend on what `torch.empty` happens to hold."""
    subject = kind(part, case)
    assert_reads_what_was_written(
        lambda: gradients_named(*differentiated(subject, subject.inputs, weights=True))
    )


def is_always_finite(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Zeros, constants and large numbers give finite results and gradients in every dtype."""
    subject = kind(part, case)
    results, gradients = differentiated(subject, subject.inputs, weights=True)
    for name, x in gradients_named(results, gradients).items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            at = [int(i) for i in (~x.isfinite()).nonzero()[0]]
            raise AssertionError(
                f"{name}{at}: {float(x[tuple(at)])} from {case.kind} inputs in {case.dtype}"
            )


def gradients_are_right(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Gradients with respect to inputs and weights equal finite differences, in float64."""
    subject = kind(part, case)
    names = [name for name, x in subject.inputs.items() if x.is_floating_point()]
    weights = dict(subject.part.named_parameters()) if isinstance(subject.part, nn.Module) else {}

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        results, _ = subject.run(subject.inputs | dict(zip(names, given, strict=False)))
        # gradcheck wants a differentiable result, also from a part that has none
        return tuple(
            x for name, x in results.items() if x.is_floating_point() and x.requires_grad
        ) or (given[0] * 0,)

    given = [subject.inputs[name].clone().requires_grad_() for name in names]
    with prefixed("gradients differ from finite differences"):
        torch.autograd.gradcheck(run, (*given, *weights.values()), fast_mode=True, nondet_tol=0.0)


def state_dict_is_all_there_is(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Another copy of the part that loads the state dict gives the same bits."""
    subject = kind(part, case)
    other = kind(part, case)
    other.part = made(part, case.dims, case.dtype, case.seed + 1)
    reload(subject.part, other.part)
    with torch.no_grad(), prefixed("a copy that loaded the state dict gives another result"):
        assert_bits(other.run(subject.inputs)[0], subject.run(subject.inputs)[0])


def is_built_once(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A second build raises a ValueError, so that no two layers share weights by accident."""
    part.build(case.dims)
    try:
        part.build(case.dims)
    except ValueError:
        return
    raise AssertionError("a second build(dims) was accepted")


def compiled_is_eager(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, forward and backward."""
    subject, fast = kind(part, case), kind(part, case)

    def eager() -> Results:
        return gradients_named(*differentiated(subject, subject.inputs, weights=True))

    with compiled(getattr(fast, kind.compiles)) as traced:
        setattr(fast, kind.compiles, traced)
        results, gradients = differentiated(fast, fast.inputs, weights=True)
    # a compiled module prefixes the names of its weights
    gradients = {name.removeprefix("_orig_mod."): x for name, x in gradients.items()}
    with prefixed("compiled and eager differ"):
        assert_same(gradients_named(results, gradients), eager(), eager)


def works_in_a_layer(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """In a HAMLayer with plain other parts, it is causal and pieces give what one pass gives."""
    composes(kind.kind, part, case)


def composes(kind: str, part: Any, case: PartInputs) -> None:
    """Asserts that a layer around a part of the named kind is causal and streams."""
    layer = layer_with(kind, part, case.dims)
    is_causal(LayerSubject, copy.deepcopy(layer), case)
    any_split_is_one_pass(LayerSubject, layer, case)
