"""Policies as plain JSON: a closed table of hamblocks' own parts, read in both directions.

A policy is an object with the name of a part as "type"; everything else is an argument of that part's constructor:

    {"type": "any_of", "of": [
        {"type": "threshold", "controller": {"type": "target_fraction", "fraction": 0.25}},
        {"type": "window", "width": 64}]}

Nothing is imported by name: parts of a user's own go to the model as objects (`layer=`).
"""

from __future__ import annotations

import inspect
import re
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

from hamblocks.attention import SelectedAttention
from hamblocks.combiners import GatedSum, SoftmaxMix
from hamblocks.controllers import FixedThreshold, TargetFraction, shortest
from hamblocks.gates import LearnedRouter, PeriodicGate, PredictionError, RandomGate, SharedGate
from hamblocks.memory import DeltaMemory, GatedDeltaMemory
from hamblocks.selectors import AllOf, AnyOf, FirstTokens, Threshold, TopK, Window
from hamblocks_ops.arguments import wrong

Policy = dict[str, Any]


class _Entry(NamedTuple):
    """A part in the table, and which of its arguments are parts themselves."""

    part: type[Any]
    parts: dict[str, str]


def _named(*parts: type[Any], **inner: str) -> dict[str, _Entry]:
    """A part's name in JSON is its class name in snake case; `inner` as in `_Entry.parts`."""
    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part.__name__).lower(): _Entry(part, inner)
        for part in parts
    }


TABLE: dict[str, dict[str, _Entry]] = {
    "memory": _named(DeltaMemory, GatedDeltaMemory),
    "gate": _named(LearnedRouter, PeriodicGate, PredictionError, RandomGate)
    | _named(SharedGate, gate="gate"),
    "selector": _named(AllOf, AnyOf, FirstTokens, TopK, Window)
    | _named(Threshold, controller="controller"),
    "controller": _named(FixedThreshold, TargetFraction),
    "attention": _named(SelectedAttention),
    "combiner": _named(GatedSum, SoftmaxMix),
}
"""Kinds of parts -> names -> parts."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

COMBINED = (AllOf, AnyOf)
"""Parts of two sides, which a policy lists under "of"."""


def complete(kind: str, policy: object) -> Policy:
    """A policy with every argument, those left out at their defaults.

    Args:
        kind: memory, gate, selector, controller, attention or combiner.
        policy: as JSON; a number for a controller is a fixed threshold.

    Raises:
        ValueError: an unknown name or argument, or a missing one; the message lists what exists.
    """
    if kind == "controller" and isinstance(policy, (int, float)) and not isinstance(policy, bool):
        policy = {"type": "fixed_threshold", "tau": float(policy)}
    names = TABLE[kind]
    if not isinstance(policy, dict) or not isinstance(policy.get("type"), str):
        raise wrong(kind, f'an object with one of {", ".join(names)} as "type"', repr(policy))
    name, given = (
        policy["type"],
        {argument: value for argument, value in policy.items() if argument != "type"},
    )
    if name not in names:
        raise wrong(kind, f'one of {", ".join(names)} as "type"', repr(name))
    entry, where = names[name], f"{kind} {name}"
    if entry.part in COMBINED:
        sides = given.pop("of", None)
        if given or not isinstance(sides, (list, tuple)) or len(sides) < 2:
            raise wrong(where, 'a list of two or more as "of", and nothing else', repr(policy))
        return {"type": name, "of": [complete(kind, side) for side in sides]}
    arguments = _arguments(entry.part)
    missing = [
        argument for argument, default in arguments.items() if default is inspect.Parameter.empty
    ]
    if not (set(missing) <= set(given) <= set(arguments)):
        listed = ", ".join(
            argument + ("" if argument in missing else " (optional)") for argument in arguments
        )
        raise wrong(where, f"the arguments {listed or '(none)'}", ", ".join(given) or "none")
    full = {argument: given.get(argument, default) for argument, default in arguments.items()}
    for argument, inner in entry.parts.items():
        full[argument] = complete(inner, full[argument])
    return {"type": name, **full}


def make(kind: str, policy: object) -> Any:
    """A new part from its policy.

    Raises:
        ValueError: an unknown name or argument, or a value that the part refuses.
    """
    full = complete(kind, policy)
    entry = TABLE[kind][full.pop("type")]
    if entry.part in COMBINED:
        return reduce(entry.part, [make(kind, side) for side in full["of"]])
    for argument, inner in entry.parts.items():
        full[argument] = make(inner, full[argument])
    return entry.part(**full)


def describe(kind: str, part: object) -> Policy:
    """The policy of a part.

    Raises:
        ValueError: it is none of hamblocks' own.
    """
    found = [(name, entry) for name, entry in TABLE[kind].items() if type(part) is entry.part]
    if not found:
        raise wrong(
            kind,
            f"one of hamblocks' own parts ({', '.join(TABLE[kind])}); others go in by layer=",
            part,
        )
    name, entry = found[0]
    if entry.part in COMBINED:
        return {"type": name, "of": [describe(kind, side) for side in _sides(part)]}
    values = {argument: getattr(part, argument) for argument in _arguments(entry.part)}
    for argument, inner in entry.parts.items():
        values[argument] = describe(inner, values[argument])
    return {
        "type": name,
        **{key: shortest(x) if isinstance(x, Tensor) else x for key, x in values.items()},
    }


def _sides(part: Any) -> list[Any]:
    """(a | b) | c as a, b, c; but a | (b | c) as a, b | c: as it would be built from the list."""
    return [*(_sides(part.left) if type(part.left) is type(part) else [part.left]), part.right]


def _arguments(part: type[Any]) -> dict[str, Any]:
    """Arguments of a constructor and their defaults; a part without a constructor has none."""
    parameters = inspect.signature(part).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind not in VARIADIC
    }
