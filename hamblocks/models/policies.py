"""Policies as plain JSON: a closed table of hamblocks' own parts, read in both directions.

A policy is an object with the name of a part as "type"; everything else is an argument of that
part's constructor:

    {"type": "any_of", "of": [
        {"type": "threshold", "controller": {"type": "target_fraction", "fraction": 0.25}},
        {"type": "window", "width": 64}]}

Nothing is imported by name. Parts of a user's own go to the model as objects (`layer=`).
"""

from __future__ import annotations

import copy
import inspect
import numbers
import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from hamblocks.attention import SelectedAttention
from hamblocks.combiners import GatedSum, ScaledSum, SoftmaxMix
from hamblocks.controllers import (
    AnnealedFraction,
    ElasticFraction,
    FixedThreshold,
    TargetFraction,
    shortest,
)
from hamblocks.controllers.adapters import without_adapter
from hamblocks.gates import (
    CommittedWrite,
    GivenScore,
    KeyNorm,
    LearnedRouter,
    PeriodicGate,
    PredictionEntropy,
    PredictionError,
    RandomGate,
    RecallError,
    SharedGate,
    ValueNorm,
    WeightedSum,
)
from hamblocks.memory import DeltaMemory, GatedDeltaMemory
from hamblocks.protocols import (
    Attention,
    Combiner,
    Controller,
    Gate,
    Memory,
    QueryGate,
    Selector,
)
from hamblocks.query_gates import ThresholdQueries
from hamblocks.selectors import (
    AllOf,
    AnyOf,
    Budget,
    Combined,
    Cooldown,
    ErrorMass,
    FirstTokens,
    HeadThresholds,
    PromptFraction,
    SublinearGrowth,
    Threshold,
    TopK,
    Window,
)
from hamblocks.unstored_memory import UnstoredMemory
from hamblocks_ops.arguments import wrong

Policy = dict[str, Any]

PARTS: dict[str, tuple[type[Any], ...]] = {
    "memory": (DeltaMemory, GatedDeltaMemory, UnstoredMemory),
    "gate": (
        CommittedWrite,
        GivenScore,
        KeyNorm,
        LearnedRouter,
        PeriodicGate,
        PredictionEntropy,
        PredictionError,
        RandomGate,
        RecallError,
        SharedGate,
        ValueNorm,
        WeightedSum,
    ),
    "selector": (
        AllOf,
        AnyOf,
        Budget,
        Cooldown,
        ErrorMass,
        FirstTokens,
        HeadThresholds,
        PromptFraction,
        SublinearGrowth,
        Threshold,
        TopK,
        Window,
    ),
    "query_gate": (ThresholdQueries,),
    "controller": (AnnealedFraction, ElasticFraction, FixedThreshold, TargetFraction),
    "attention": (SelectedAttention,),
    "combiner": (GatedSum, ScaledSum, SoftmaxMix),
}
"""Kinds of parts, and the classes that a policy can name. To add a part, add its class here.

A part's name is its class name in snake case. Its arguments are those of its constructor, each an
attribute of the same name. One that is annotated with a protocol is a policy itself, and one that
is annotated with a sequence of a protocol is a list of policies.
"""

PROTOCOLS: dict[object, str] = {
    Memory: "memory",
    Gate: "gate",
    Selector: "selector",
    QueryGate: "query_gate",
    Controller: "controller",
    Attention: "attention",
    Combiner: "combiner",
}
"""The kind of part that an argument annotated with a protocol takes."""


def name_of(part: type[Any]) -> str:
    """The name of a part's class in a policy: snake case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part.__name__).lower()


TABLE: dict[str, dict[str, type[Any]]] = {
    kind: {name_of(part): part for part in parts} for kind, parts in PARTS.items()
}
"""Kinds of parts -> names -> classes."""


def complete(kind: str, policy: object) -> Policy:
    """A policy with every argument; those left out get their defaults.

    Args:
        kind: memory, gate, selector, query_gate, controller, attention or combiner.
        policy: as JSON. A number as the policy of a controller is a fixed threshold.

    Raises:
        ValueError: an unknown name or argument, or a missing one; the message lists what exists.
    """
    if kind == "controller" and isinstance(policy, numbers.Real) and not isinstance(policy, bool):
        policy = {"type": name_of(FixedThreshold), "tau": float(policy)}
    names = TABLE[kind]
    if not isinstance(policy, dict) or not isinstance(policy.get("type"), str):
        raise wrong(kind, f'an object with one of {", ".join(names)} as "type"', repr(policy))
    name = policy["type"]
    if name not in names:
        raise wrong(kind, f'one of {", ".join(names)} as "type"', repr(name))
    given = {argument: value for argument, value in policy.items() if argument != "type"}
    where = f"{kind} {name}"
    if issubclass(names[name], Combined):
        return {"type": name, "of": _complete_sides(kind, where, given)}
    defaults = _defaults(names[name])
    _check_arguments(where, given, defaults)
    # JSON has lists only, so a policy compares equal after it was saved and loaded
    full = {
        argument: list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        for argument, value in {**defaults, **given}.items()
    }
    for argument, inner in _inner_parts(names[name]).items():
        if inner.many and not isinstance(full[argument], (list, tuple)):
            raise wrong(where, f'a list as "{argument}"', repr(full[argument]))
        full[argument] = inner.each(complete, full[argument])
    return {"type": name, **full}


def part_of(kind: str, policy: object) -> Any:
    """Makes a new part from its policy.

    Args:
        kind: as in `complete`.
        policy: as in `complete`.

    Raises:
        ValueError: an unknown name or argument, or a value that the part refuses.
    """
    full = complete(kind, policy)
    part = TABLE[kind][full.pop("type")]
    if issubclass(part, Combined):
        return reduce(part, [part_of(kind, side) for side in full["of"]])
    for argument, inner in _inner_parts(part).items():
        full[argument] = inner.each(part_of, full[argument])
    return part(**full)


def policy_of(kind: str, part: object) -> Policy:
    """The policy of a part, complete.

    Args:
        kind: as in `complete`.
        part: one of hamblocks' own parts.

    Raises:
        ValueError: it is none of hamblocks' own.
    """
    part = without_adapter(part)
    own = type(part)
    if own not in PARTS[kind]:
        names = ", ".join(TABLE[kind])
        raise wrong(kind, f"one of hamblocks' own parts ({names}); others go in by layer=", part)
    if issubclass(own, Combined):
        return {"type": name_of(own), "of": [policy_of(kind, side) for side in _sides(part)]}
    inner = _inner_parts(own)
    values = {}
    for argument in _defaults(own):
        value = getattr(part, argument)
        if argument in inner:
            value = inner[argument].each(policy_of, value)
        values[argument] = _plain(value)
    return {"type": name_of(own), **values}


def _plain(value: Any) -> Any:
    """An argument as JSON gives it back: a list for a tuple, numbers of torch and numpy as Python's."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor):
        return shortest(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _complete_sides(kind: str, where: str, given: dict[str, Any]) -> list[Policy]:
    """The sides of `|` or `&`, which a policy lists under "of"."""
    sides = given.get("of")
    if set(given) != {"of"} or not isinstance(sides, (list, tuple)) or len(sides) < 2:
        raise wrong(where, 'a list of two or more as "of", and nothing else', repr(given))
    return [complete(kind, side) for side in sides]


def _check_arguments(where: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Checks that no argument is missing or unknown."""
    required = [name for name, value in defaults.items() if value is inspect.Parameter.empty]
    if set(required) <= set(given) <= set(defaults):
        return
    listed = [name if name in required else f"{name} (optional)" for name in defaults]
    expected = f"the arguments {', '.join(listed) or '(none)'}"
    raise wrong(where, expected, ", ".join(given) or "none")


def _sides(part: Any) -> list[Any]:
    """The sides of `(a | b) | c` are a, b, c; those of `a | (b | c)` are a and b | c.

    A list is combined from the left, so each is made from its policy as it was.
    """
    first = _sides(part.left) if type(part.left) is type(part) else [part.left]
    return [*first, part.right]


def _defaults(part: type[Any]) -> dict[str, Any]:
    """Arguments of a constructor and their defaults (`inspect.Parameter.empty` for none)."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(part).parameters.values()
        # a class without a constructor of its own shows nn.Module's *args and **kwargs
        if parameter.kind not in variadic
    }


class _Inner(NamedTuple):
    """An argument of a constructor that is a part itself, or a list of parts.

    Attributes:
        kind: the kind of the part.
        many: whether it is a list.
    """

    kind: str
    many: bool

    def each(self, call: Callable[[str, Any], Any], value: Any) -> Any:
        """Calls `call(kind, part)` for the part, or for every part of the list."""
        return [call(self.kind, one) for one in value] if self.many else call(self.kind, value)


def _inner_parts(part: type[Any]) -> dict[str, _Inner]:
    """Arguments of a constructor that are parts themselves, or lists of parts."""
    hints = get_type_hints(part.__init__)
    return {
        argument: _Inner(PROTOCOLS[hint], get_origin(hints[argument]) is Sequence)
        for argument in _defaults(part)
        for hint in get_args(hints.get(argument)) or [hints.get(argument)]
        if hint in PROTOCOLS
    }
