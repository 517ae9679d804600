"""The common laws as checks, and the cases that they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from hamblocks.protocols import surrogate_gradient
from hamblocks.testing import laws
from hamblocks.testing.check import Check, Options
from hamblocks.testing.inputs.parts import DIMS, KINDS, PartInputs, packed_part_inputs, part_inputs
from hamblocks.testing.subjects import Subject, made

Cases = Callable[[Options], Any]
"""Makes the strategy that a check draws its cases from."""

Edges = Callable[[Options], list[PartInputs]]
"""Makes the cases that a check runs first, before the drawn ones."""


def exact(options: Options) -> dict[str, Any]:
    """Fields of a case that are not drawn where a law compares two results.

    The dtype is the first of the options, and the sizes are those of the options, if any.
    """
    fixed: dict[str, Any] = {"dtype": options.dtypes[0]}
    return fixed if options.dims is None else fixed | {"dims": options.dims}


def first(options: Options, **fields: Any) -> PartInputs:
    """One case with the given fields; the sizes of the options win over `fields`."""
    sizes = {} if options.dims is None else {"dims": options.dims}
    return PartInputs(**({"dtype": options.dtypes[0]} | fields | sizes))


def cases_of(strategy: Callable[..., st.SearchStrategy[Any]], **fixed: Any) -> Cases:
    """Cases drawn by `strategy`, except for `fixed` fields and what the options fix."""
    return lambda options: strategy(**(fixed | exact(options)))


def edges_of(*fields: dict[str, Any]) -> Edges:
    """Cases with the given fields, one for each dict; the sizes of the options win."""
    return lambda options: [first(options, **one) for one in fields]


def no_module(part: Any, _options: Options) -> str | None:
    """The reason why a check of the state dict does not apply, or None."""
    return (
        None if isinstance(part, nn.Module) else "it is no torch.nn.Module, so it has no state dict"
    )


EDGES = edges_of({"tokens": 1, "cuts": (1,), "batch": 1}, {"tokens": 14, "cuts": (9,)})
TWO_ROWS = edges_of({"batch": 1}, {"batch": 2, "seed": 1})
PACKED = edges_of({"packed": (0, 1, 9, 0, 0, 4, 0), "seed": 3})
SPLIT = edges_of(
    {"tokens": 14, "cuts": tuple(range(14))},
    {"tokens": 14, "cuts": (9, *range(9, 14))},
)
LONG = edges_of({"tokens": 150, "cuts": (70, 133), "batch": 1})
"""More tokens than a part that works in chunks of 16, 32, 64 or 128 takes at a time."""
LONG_PACKED = edges_of({"packed": (70, 0, 133, 1), "seed": 3})
LONG_DIFFERENCES = edges_of({"tokens": 70, "batch": 1})
SHAPES = edges_of({}, {"tokens": 1, "batch": 1})
NO_TOKEN = edges_of({"tokens": 0, "cuts": (0,)}, {"batch": 0}, {"batch": 0, "tokens": 0})
"""Empty batches, for layers alone: a layer accepts them and then calls none of its parts."""
NOTHING_PACKED = edges_of({"packed": ()}, {"packed": (0,)})
FINITE_DIFFERENCES = edges_of(
    {"tokens": 4, "batch": 1}, {"tokens": 5, "dims": DIMS[2], "bias": True, "seed": 1}
)


def _degenerate(options: Options) -> list[PartInputs]:
    return [
        first(options, kind=kind, dtype=dtype, tokens=5, bias=True)
        for kind in KINDS[1:]
        for dtype in options.dtypes
    ]


def _both(one: Edges, other: Edges) -> Edges:
    return lambda options: [*one(options), *other(options)]


def _no_build(part: Any, options: Options) -> str | None:
    if not hasattr(part, "build"):
        return "it has no build(dims)"
    built = made(part, options.dims or DIMS[0], options.dtypes[0], 0)
    return None if any(True for _ in built.parameters()) else "it has no weights to share"


def _no_finite_differences(part: Any, options: Options) -> str | None:
    gates = part, getattr(part, "gate", None), getattr(part, "query_gate", None)
    if any(surrogate_gradient(one) for one in gates):
        return "its gradient is a surrogate, not that of its values"
    return None if torch.float64 in options.dtypes else "finite differences need float64"


def _with_empty(kind: type[Subject], edges: Edges) -> Edges:
    """The edges of a kind: a layer must handle empty batches too."""
    if kind.kind == "layer" and edges in (EDGES, SPLIT, SHAPES):
        return _both(edges, NO_TOKEN)
    if kind.kind == "layer" and edges is PACKED:
        return _both(edges, NOTHING_PACKED)
    return edges


def common(kind: type[Subject], *, share: int = 1, bias: bool = False) -> list[Check]:
    """The laws of `laws.py` as checks of one kind of part.

    Args:
        kind: the subject of that kind.
        share: every check runs `1 / share` of the profile's number of cases.
        bias: draw cases with and without a logit bias.
    """
    fixed: dict[str, Any] = {"bias": st.booleans()} if bias else {}
    one = cases_of(part_inputs, **fixed)
    batches = cases_of(part_inputs, batch=st.integers(1, 3), **fixed)
    packed = cases_of(packed_part_inputs, **fixed)

    def any_dtype(options: Options) -> Any:
        drawn = {"dtype": st.sampled_from(options.dtypes), "kind": st.sampled_from(KINDS)}
        return part_inputs(**(fixed | exact(options) | drawn))

    def check(
        law: laws.Law,
        cases: Cases | None,
        edges: Edges,
        *,
        longer: Edges | None = None,
        divided: int = 1,
        **more: Any,
    ) -> Check:
        def body(part: Any, case: PartInputs, _options: Options) -> None:
            law(kind, part, case)

        # the first line of the law's docstring is what the check prints as its purpose
        body.__doc__ = law.__doc__
        name = f"check_{kind.kind}_{law.__name__}"
        edges = _with_empty(kind, edges)
        # for layers both ways of running a long sequence are enough: gradients take seconds
        if longer is not None and (kind.kind != "layer" or longer is LONG):
            edges = _both(edges, longer)
        return Check(name, kind.kind, body, cases, edges, share=share * divided, **more)

    found = [
        check(laws.has_its_shapes, any_dtype, SHAPES),
        check(laws.is_causal, one, EDGES, longer=LONG),
        check(laws.gradients_are_causal, one, EDGES),
        check(laws.rows_are_independent, batches, TWO_ROWS, divided=2),
        check(laws.packed_is_one_by_one, packed, PACKED, longer=LONG_PACKED),
        check(laws.any_split_is_one_pass, one, SPLIT, longer=LONG),
        check(laws.same_call_same_bits, one, EDGES, divided=2),
        check(laws.nothing_given_changes, one, EDGES, divided=2),
        check(laws.strides_do_not_matter, one, EDGES, divided=4),
        check(laws.reads_no_unwritten_memory, one, EDGES, divided=2),
        check(laws.is_always_finite, any_dtype, _degenerate),
        check(
            laws.gradients_are_right,
            None,
            FINITE_DIFFERENCES,
            longer=LONG_DIFFERENCES,
            applies=_no_finite_differences,
        ),
        check(laws.state_dict_is_all_there_is, None, EDGES, applies=no_module),
        check(laws.compiled_is_eager, None, edges_of({"tokens": 6, "bias": True}), slow=True),
    ]
    if kind.kind != "layer":
        found += [
            check(laws.is_built_once, None, edges_of({}), applies=_no_build),
            check(laws.works_in_a_layer, one, SPLIT, divided=2),
        ]
    return found
