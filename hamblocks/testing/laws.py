"""The laws that parts of several kinds obey, each written once over a `Subject`."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from hamblocks.state import leaves
from hamblocks.testing.budget import assert_bits, assert_same
from hamblocks.testing.check import Check, Options, plain
from hamblocks.testing.inputs.draw import Draw, borders, lay_out, pieces
from hamblocks.testing.inputs.parts import DIMS, KINDS, PartInputs, packed_part_inputs, part_inputs
from hamblocks.testing.subjects import LayerSubject, Results, Subject, layer_with, made
from hamblocks.testing.uninitialised import FilledMemory

Law = Callable[[type[Subject], Any, PartInputs], None]


def head(results: Mapping[str, Tensor], t: int) -> Results:
    """What was said of the tokens before t, as far as queries before t can tell."""
    return {
        name: x[:, :t].clamp(max=t) if name == "evict_at" else x[:, :t]
        for name, x in results.items()
    }


def differentiated(
    subject: Subject,
    inputs: Mapping[str, Tensor],
    *,
    parts: Sequence[tuple[slice, slice]] = ((slice(None), slice(None)),),
    cu_seqlens: Tensor | None = None,
    weights: bool = False,
) -> tuple[Results, dict[str, Tensor]]:
    """Results, and the gradient of a weighted sum of them by every floating input (and weight).

    `parts` are the rows and tokens that are summed; each is weighted as it is when it is run alone.
    """
    given = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    results, _ = subject.run(given, cu_seqlens=cu_seqlens)
    wanted = {name: x for name, x in given.items() if x.requires_grad}
    if weights and isinstance(subject.part, nn.Module):
        wanted |= {name: x for name, x in subject.part.named_parameters() if x.requires_grad}
    roots = [x[part] for part in parts for x in results.values() if x.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if roots:
        cotangents = [Draw(7).normal(*x.shape).to(x.dtype) for x in roots]
        gradients = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
    filled = [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(wanted.values(), gradients, strict=True)
    ]
    return {name: x.detach() for name, x in results.items()}, dict(zip(wanted, filled, strict=True))


def by_token(inputs: Mapping[str, Tensor], where: slice) -> dict[str, Tensor]:
    """The same inputs, some tokens of them."""
    return {name: x[:, where] for name, x in inputs.items()}


def gradients_named(results: Results, gradients: Mapping[str, Tensor]) -> Results:
    """Results and gradients side by side."""
    return results | {f"grad of {name}": x for name, x in gradients.items()}


# laws


def has_its_shapes(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Every result has the shape and dtype that the protocol names, for no token and no row too."""
    subject = kind(part, case)
    results, _ = subject.run(subject.inputs)
    told = subject.shapes()
    for name, x in results.items():
        shape, dtype = told[name]
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
        assert fits, f"{name}: shape {list(x.shape)}, expected {list(shape)} behind [B, T]"
        assert dtype is None or x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}"
        _, heads, kv_heads, *_ = getattr(subject.part, "dims", None) or case.dims
        if name in ("score", "logit_bias", "evict_at") and subject.kind != "memory":
            right = {1, kv_heads, heads} if name == "score" else {1, kv_heads}
            assert x.shape[2] in right, (
                f"{name}: {x.shape[2]} heads, expected one of {sorted(right)}"
            )


def is_causal(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Changing inputs from position t on changes no result before t."""
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    other = subject.drawn(replace(case, seed=case.seed + 1))
    changed = {
        name: torch.cat([x[:, :t], other[name][:, t:]], 1) for name, x in subject.inputs.items()
    }

    def run(inputs: Mapping[str, Tensor]) -> Results:
        with torch.no_grad():
            return head(subject.run(inputs)[0], t)

    with told(f"results before position {t} changed with the inputs from it on"):
        assert_same(run(changed), run(subject.inputs), lambda: run(subject.inputs))


def gradients_are_causal(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Results before position t have no gradient by inputs from t on."""
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    _, gradients = differentiated(subject, subject.inputs, parts=[(slice(None), slice(0, t))])
    for name, grad in gradients.items():
        assert bool(grad.isfinite().all()), f"grad of {name}: not finite"
        later = grad[:, t:]
        assert not bool(later.any()), (
            f"grad of {name}: results before position {t} have gradient {float(later.abs().max()):.3g} from it on"
        )


def rows_are_independent(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A batch gives what its rows give alone, forward and backward."""
    subject = kind(part, case)

    def alone() -> Results:
        rows = [
            gradients_named(
                *differentiated(subject, {name: x[n : n + 1] for name, x in subject.inputs.items()})
            )
            for n in range(case.batch)
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    parts = [(slice(n, n + 1), slice(None)) for n in range(case.batch)]
    together = gradients_named(*differentiated(subject, subject.inputs, parts=parts))
    with told("a row alone gives another result than in a batch"):
        assert_same(together, alone(), alone)


def packed_is_one_by_one(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Sequences packed into one row give what they give alone, forward and backward; empty ones change nothing."""
    subject = kind(part, case)
    assert case.packed is not None
    own = pieces(case.packed)
    cu_seqlens = borders(case.packed)

    def alone() -> Results:
        rows = [
            gradients_named(*differentiated(subject, by_token(subject.inputs, where)))
            for where in own
            if where.stop > where.start or not any(case.packed or ())
        ]
        if not rows:
            return gradients_named(*differentiated(subject, subject.inputs, cu_seqlens=cu_seqlens))
        return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}

    parts = [(slice(None), where) for where in own]
    together = gradients_named(
        *differentiated(subject, subject.inputs, parts=parts, cu_seqlens=cu_seqlens)
    )
    with told("a sequence alone gives another result than packed"):
        assert_same(together, alone(), alone)


def any_split_is_one_pass(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Pieces of any size with the state handed over, single tokens too, give what one pass gives."""
    subject = kind(part, case)
    ends = case.borders

    @torch.no_grad()
    def whole() -> Results:
        return _until_each_end(subject.run(subject.inputs)[0], ends)

    with torch.no_grad():
        state, told_pieces = subject.start(case.batch), []
        for begin, end in pairwise(ends):
            if begin == end and subject.kind != "layer":
                continue  # no part is called without a token
            results, state = subject.run(by_token(subject.inputs, slice(begin, end)), state)
            if begin == end and case.tokens:
                continue  # of no token nothing is decided, so the number of heads is open
            told_pieces.append(
                {n: x.clamp(max=end) if n == "evict_at" else x for n, x in results.items()}
            )
    got = {name: torch.cat([piece[name] for piece in told_pieces], 1) for name in told_pieces[0]}
    with told(f"pieces that end at {ends[1:]} give another result than one pass"):
        assert_same(got, whole(), whole)


def _until_each_end(results: Results, ends: Sequence[int]) -> Results:
    """Lifetimes as far as they were known when the piece of the token ended."""
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
    """Inputs, the state and, in eval mode, parameters and buffers are as before after a call, however they lie."""
    subject = kind(part, case)
    t = min(case.cuts[0], case.tokens)
    if subject.kind != "layer":  # no part is called without a token
        t = max(1, min(t, case.tokens - 1))
    with torch.no_grad():
        _, state = subject.run(by_token(subject.inputs, slice(0, t)), subject.start(case.batch))
        kept = dict(subject.part.state_dict()) if isinstance(subject.part, nn.Module) else {}
        given = dict(subject.inputs) | {
            name: x for name, x in kept.items() if isinstance(x, Tensor)
        }
        if subject.kind != "attention":  # a cache is handed on, changed
            tree = state[:3] if subject.kind == "layer" and state is not None else state
            given |= {f"state {i}": x for i, x in enumerate(leaves(tree))}
        with unchanged(given):
            if t < case.tokens or subject.kind == "layer":
                subject.run(by_token(subject.inputs, slice(t, None)), state)
            subject.run(subject.inputs)


def strides_do_not_matter(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Inputs that are views into other memory give what contiguous ones give."""
    subject = kind(part, case)

    @torch.no_grad()
    def run(layout: str) -> Results:
        lie = {
            n: lay_out(x, layout) if x.is_floating_point() else x.mT.contiguous().mT
            for n, x in subject.inputs.items()
        }
        return subject.run(lie)[0]

    for layout in ("transposed", "strided"):
        with told(f"{layout} inputs give another result than contiguous ones"):
            assert_same(run(layout), run("contiguous"), lambda: run("contiguous"))


def reads_no_unwritten_memory(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Results do not depend on what `torch.empty` happens to hold."""
    subject = kind(part, case)
    assert_reads_what_was_written(
        lambda: gradients_named(*differentiated(subject, subject.inputs, weights=True))
    )


def is_always_finite(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Zeros, constants and large numbers, in every dtype, give finite results and finite gradients."""
    subject = kind(part, case)
    results, gradients = differentiated(subject, subject.inputs, weights=True)
    for name, x in gradients_named(results, gradients).items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            at = [int(i) for i in (~x.isfinite()).nonzero()[0]]
            raise AssertionError(
                f"{name}{at}: {float(x[tuple(at)])} out of {case.kind} inputs in {case.dtype}"
            )


def gradients_are_right(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Gradients by inputs and weights are those of finite differences, in float64."""
    subject = kind(part, case)
    names = [name for name, x in subject.inputs.items() if x.is_floating_point()]
    weights = dict(subject.part.named_parameters()) if isinstance(subject.part, nn.Module) else {}

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        results, _ = subject.run(subject.inputs | dict(zip(names, given, strict=False)))
        return tuple(
            x for name, x in results.items() if x.is_floating_point() and x.requires_grad
        ) or (given[0] * 0,)

    given = [subject.inputs[name].clone().requires_grad_() for name in names]
    with told("gradients differ from finite differences"):
        torch.autograd.gradcheck(run, (*given, *weights.values()), fast_mode=True, nondet_tol=0.0)


def state_dict_is_all_there_is(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """Another copy of the part that loads the state dict gives the same bits."""
    subject = kind(part, case)
    other = kind(part, case)
    other.part = made(part, case.dims, case.dtype, case.seed + 1)
    reload(subject.part, other.part)
    with torch.no_grad(), told("a copy that loaded the state dict gives another result"):
        assert_bits(other.run(subject.inputs)[0], subject.run(subject.inputs)[0])


def is_built_once(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """A second build is a ValueError, so that no two layers share weights by accident."""
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
    # a compiled module calls its weights by other names
    gradients = {name.removeprefix("_orig_mod."): x for name, x in gradients.items()}
    with told("compiled and eager differ"):
        assert_same(gradients_named(results, gradients), eager(), eager)


@contextmanager
def compiled(part: Any) -> Iterator[Any]:
    """The part traced without a break, and run by torch's own decompositions: what a backend compiles, not its code."""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():  # tracing looks at the grad of inputs that are no leaves
            warnings.filterwarnings("ignore", message=r"The \.grad attribute", category=UserWarning)
            yield torch.compile(part, fullgraph=True, backend="aot_eager_decomp_partition")
    finally:
        torch.compiler.reset()


def works_in_a_layer(kind: type[Subject], part: Any, case: PartInputs) -> None:
    """In a HAMLayer with plain other parts, pieces of any size give what one pass gives, and it is causal."""
    composes(kind.kind, part, case)


# what laws are made of


def composes(kind: str, part: Any, case: PartInputs) -> None:
    """In a HAMLayer with plain other parts, a part streams and is causal."""
    layer = layer_with(kind, part, case.dims)
    is_causal(LayerSubject, copy.deepcopy(layer), case)
    any_split_is_one_pass(LayerSubject, layer, case)


def assert_twice(run: Callable[[], Results]) -> None:
    """A computation gives the same bits twice, whatever the random state."""
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(run())
    with told("the same call gave two results"):
        assert_bits(*results)


def assert_reads_what_was_written(run: Callable[[], Results]) -> None:
    """A computation gives the same bits whatever unwritten memory holds."""
    filled = []
    for value in (0.0, float("nan"), 3.0):
        with FilledMemory(value):
            filled.append(run())
    with told("the result depends on memory that nobody wrote"):
        for other in filled[1:]:
            assert_bits(other, filled[0])


@contextmanager
def unchanged(given: Mapping[str, Tensor]) -> Iterator[None]:
    """What happens within changes none of these tensors."""
    before = {name: x.clone() for name, x in given.items()}
    yield
    with told("a call changed what it was given"):
        assert_bits(given, before)


def reload(module: nn.Module, other: nn.Module) -> None:
    """Has `other` load the state dict of `module`, through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))


def assert_never_longer(kept: Sequence[Tensor]) -> None:
    """Lifetimes under rising thresholds."""
    for low, high in pairwise(kept):
        assert bool((high <= low).all()), "a lifetime became longer as tau was raised"


@contextmanager
def told(what: str) -> Iterator[None]:
    """Says what a failed comparison means."""
    try:
        yield
    except (AssertionError, GradcheckError) as error:
        raise AssertionError(f"{what}: {plain(error)}") from error


# the laws as checks


def exact(options: Options) -> dict[str, Any]:
    """Fixed fields of the cases of laws that compare two results: the widest dtype."""
    fixed: dict[str, Any] = {"dtype": options.dtypes[0]}
    return fixed if options.dims is None else fixed | {"dims": options.dims}


def first(options: Options, **fields: Any) -> PartInputs:
    """One case by hand."""
    sizes = {} if options.dims is None else {"dims": options.dims}
    return PartInputs(**({"dtype": options.dtypes[0]} | fields | sizes))


def cases_of(
    strategy: Callable[..., st.SearchStrategy[Any]], **fixed: Any
) -> Callable[[Options], Any]:
    """Drawn cases, as far as the options leave them open."""
    return lambda options: strategy(**(fixed | exact(options)))


Edges = Callable[[Options], list[PartInputs]]


def edges_of(*fields: dict[str, Any]) -> Edges:
    """Cases by hand, as far as the options leave them open."""
    return lambda options: [first(options, **one) for one in fields]


def _degenerate(options: Options) -> list[PartInputs]:
    return [
        first(options, kind=kind, dtype=dtype, tokens=5, bias=True)
        for kind in KINDS[1:]
        for dtype in options.dtypes
    ]


def no_module(part: Any, _options: Options) -> str | None:
    """For checks of what a state dict holds."""
    return (
        None if isinstance(part, nn.Module) else "it is no torch.nn.Module, so it has no state dict"
    )


def _no_build(part: Any, options: Options) -> str | None:
    if not hasattr(part, "build"):
        return "it has no build(dims)"
    built = made(part, options.dims or DIMS[0], options.dtypes[0], 0)
    return None if any(True for _ in built.parameters()) else "it has no weights to share"


def _no_float64(_part: Any, options: Options) -> str | None:
    return None if torch.float64 in options.dtypes else "finite differences need float64"


EDGES = edges_of({"tokens": 1, "cuts": (1,), "batch": 1}, {"tokens": 14, "cuts": (9,)})
TWO_ROWS = edges_of({"batch": 1}, {"batch": 2, "seed": 1})
PACKED = edges_of({"packed": (0, 1, 9, 0, 0, 4, 0), "seed": 3})
SPLIT = edges_of(
    {"tokens": 14, "cuts": tuple(range(14))},
    {"tokens": 14, "cuts": (9, *range(9, 14))},
)
SHAPES = edges_of({}, {"tokens": 1, "batch": 1})
NO_TOKEN = edges_of({"tokens": 0, "cuts": (0,)}, {"batch": 0}, {"batch": 0, "tokens": 0})
"""Only a layer is called without a token: it calls none of its parts then."""
NOTHING_PACKED = edges_of({"packed": ()}, {"packed": (0,)})


def _both(one: Edges, other: Edges) -> Edges:
    return lambda options: [*one(options), *other(options)]


def common(kind: type[Subject], *, share: int = 1, bias: bool = False) -> list[Check]:
    """The laws of this page as checks of a kind."""
    fixed: dict[str, Any] = {"bias": st.booleans()} if bias else {}
    one = cases_of(part_inputs, **fixed)

    def check(
        name: str,
        law: Law,
        cases: Any,
        edges: Any,
        *,
        divided: int = 1,
        slow: bool = False,
        applies: Any = None,
    ) -> Check:
        def body(part: Any, case: PartInputs, _options: Options) -> None:
            law(kind, part, case)

        body.__doc__ = law.__doc__
        if kind.kind == "layer" and edges in (EDGES, SPLIT, SHAPES):
            edges = _both(edges, NO_TOKEN)
        elif kind.kind == "layer" and edges is PACKED:
            edges = _both(edges, NOTHING_PACKED)
        more = {} if applies is None else {"applies": applies}
        return Check(
            f"check_{kind.kind}_{name}",
            kind.kind,
            body,
            cases,
            edges,
            share=share * divided,
            slow=slow,
            **more,
        )

    rows = cases_of(part_inputs, batch=st.integers(1, 3), **fixed)
    packed = cases_of(packed_part_inputs, **fixed)

    def any_dtype(options: Options) -> Any:
        drawn = {"dtype": st.sampled_from(options.dtypes), "kind": st.sampled_from(KINDS)}
        return part_inputs(**(fixed | exact(options) | drawn))

    found = [
        check("has_its_shapes", has_its_shapes, any_dtype, SHAPES),
        check("is_causal", is_causal, one, EDGES),
        check("gradients_are_causal", gradients_are_causal, one, EDGES),
        check("rows_are_independent", rows_are_independent, rows, TWO_ROWS, divided=2),
        check("packed_is_one_by_one", packed_is_one_by_one, packed, PACKED),
        check("any_split_is_one_pass", any_split_is_one_pass, one, SPLIT),
        check("same_call_same_bits", same_call_same_bits, one, EDGES, divided=2),
        check("nothing_given_changes", nothing_given_changes, one, EDGES, divided=2),
        check("strides_do_not_matter", strides_do_not_matter, one, EDGES, divided=4),
        check("reads_no_unwritten_memory", reads_no_unwritten_memory, one, EDGES, divided=2),
        check("is_always_finite", is_always_finite, any_dtype, _degenerate),
        check(
            "gradients_are_right",
            gradients_are_right,
            None,
            edges_of(
                {"tokens": 4, "batch": 1}, {"tokens": 5, "dims": DIMS[2], "bias": True, "seed": 1}
            ),
            applies=_no_float64,
        ),
        check(
            "state_dict_is_all_there_is", state_dict_is_all_there_is, None, EDGES, applies=no_module
        ),
        check(
            "compiled_is_eager",
            compiled_is_eager,
            None,
            edges_of({"tokens": 6, "bias": True}),
            slow=True,
        ),
    ]
    if kind.kind != "layer":
        found += [
            check("is_built_once", is_built_once, None, edges_of({}), applies=_no_build),
            check("works_in_a_layer", works_in_a_layer, one, SPLIT, divided=2),
        ]
    return found
