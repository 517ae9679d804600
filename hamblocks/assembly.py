"""Checks the sizes and parts of a layer, and fills in defaults, before the layer is built."""

from __future__ import annotations

import enum
import warnings
from typing import Any, Final, Literal

from torch import nn

from hamblocks.attention import SelectedAttention
from hamblocks.combiners import GatedSum
from hamblocks.gates import PredictionError
from hamblocks.memory import GatedDeltaMemory
from hamblocks.protocols import (
    Attention,
    Combiner,
    Gate,
    HasMetric,
    LayerDims,
    Memory,
    ProjectsItself,
    QueryGate,
    ReadsUnstored,
    Selector,
    check_count,
    check_part,
)
from hamblocks.reachable import find_controllers
from hamblocks.selectors import ignores_score, not_causal, revises
from hamblocks_ops.arguments import wrong


class Default(enum.Enum):
    """Value of an argument that was not given; None means that the layer has no such part."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final = Default.DEFAULT
OrDefault = Literal[Default.DEFAULT]


def is_own(part: object) -> bool:
    """Whether a part and everything callable inside it come from hamblocks or torch."""
    modules = part.modules() if isinstance(part, nn.Module) else (part,)
    held = [x for module in modules for x in (module, *getattr(module, "__dict__", {}).values())]
    ours = ("hamblocks", "hamblocks_ops", "torch")
    return all(
        type(x).__module__.partition(".")[0] in ours
        for x in held
        if callable(x) and not isinstance(x, type)
    )


def warn_of_unsaved(name: str, part: object) -> None:
    """Warns about controllers that are stepped, but whose threshold is not saved with the model."""
    for controller in find_controllers(part):
        if not isinstance(controller, nn.Module):
            warnings.warn(
                f"{name}: expected controllers that are torch.nn.Module, got "
                f"{type(controller).__name__}: it is stepped, but the model neither saves nor "
                "moves its threshold",
                stacklevel=3,
            )


def dims_of(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    memory: Any,
    attention: object,
) -> LayerDims:
    """Checks and completes the sizes of a layer."""
    hidden_size = check_count("hidden_size", hidden_size, 1)
    num_heads = check_count("num_heads", num_heads, 1)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    num_kv_heads = check_count("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise wrong("num_kv_heads", f"a divisor of num_heads = {num_heads}", str(num_kv_heads))
    if head_dim is None:
        if hidden_size % num_heads:
            expected = f"a multiple of num_heads = {num_heads}, or head_dim"
            raise wrong("hidden_size", expected, str(hidden_size))
        head_dim = hidden_size // num_heads
    head_dim = check_count("head_dim", head_dim, 1)
    if memory is None and attention is None:
        raise wrong("attention", "a memory, attention or both", "None for both")
    has = memory is not None, attention is not None
    dims = LayerDims(hidden_size, num_heads, num_kv_heads, head_dim, *has)
    if not projects_itself(memory):
        return dims
    heads, dim = memory.read_size(dims)
    return dims._replace(
        memory_heads=None if heads == num_heads else heads,
        memory_dim=None if dim == head_dim else dim,
    )


def _check_waits(selector: Selector | None, attention: object) -> None:
    """Checks the selector beside a memory that waits for what is stored.

    Raises:
        ValueError: there is none, or it may revise a lifetime.
    """
    expected = "a selector that never revises a lifetime, e.g. Threshold(TargetFraction(0.25))"
    why = "the memory reads what is not stored for good"
    if attention is None or selector is None:
        raise wrong("selector", f"{expected} ({why})", "none")
    if revises(selector):
        raise wrong("selector", f"{expected} ({why})", selector)


def projects_itself(memory: object) -> bool:
    """Whether a memory projects x itself, and gets no q, k and v."""
    return isinstance(memory, ProjectsItself) and bool(memory.own_projections)


def parts_of(
    memory: Memory | OrDefault | None,
    gate: Gate | OrDefault | None,
    selector: Selector | OrDefault | None,
    query_gate: QueryGate | None,
    attention: Attention | OrDefault | None,
    combiner: Combiner | None,
) -> dict[str, Any]:
    """The parts of a layer by name, with defaults filled in; None for parts it does not have.

    Raises:
        ValueError: something is not a part, or a part needs another one that the layer lacks.
    """
    if attention is None:
        given = {"gate": gate, "selector": selector, "query_gate": query_gate}
        for name, part in given.items():
            if part is not None and part is not DEFAULT:
                raise wrong(name, "None in a layer without attention, which stores nothing", part)
        gate = selector = None
    if memory is None:
        for name, part in (("gate", gate), ("query_gate", query_gate)):
            if isinstance(part, HasMetric):
                expected = "one that needs no memory (it scores what a memory fails to predict)"
                raise wrong(name, f"{expected} where memory=None", part)
        gate = None if gate is DEFAULT else gate
        selector = None if selector is DEFAULT else selector
    chosen = None if selector is DEFAULT else selector
    if gate is DEFAULT:  # without a selector nobody reads a score
        gate = None if selector is None else PredictionError()
    if gate is None and chosen is not None and not ignores_score(chosen):
        expected = "a gate, for a selector that reads scores, e.g. LearnedRouter()"
        raise wrong("gate", expected, f"None beside {selector}")
    if selector is DEFAULT:
        expected = "a selector, e.g. Threshold(TargetFraction(0.25)) | Window(64)"
        raise wrong("selector", f"{expected}, or None to store every token", "none")
    parts: dict[str, Any] = {
        "memory": GatedDeltaMemory() if memory is DEFAULT else memory,
        "gate": gate,
        "selector": selector,
        "query_gate": query_gate,
        "attention": SelectedAttention() if attention is DEFAULT else attention,
        "combiner": GatedSum() if combiner is None else combiner,
    }
    for kind, given in parts.items():
        if given is not None:
            check_part(kind, given)
    if isinstance(memory, ReadsUnstored):
        _check_waits(chosen, attention)
    acausal = None if selector is None else not_causal(selector)
    if acausal is not None:
        expected = "one that decides from the past"
        raise wrong("selector", expected, f"{acausal} with causal = False")
    return parts
