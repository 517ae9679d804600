"""Finds controllers and modules anywhere in a model, also inside plain Python objects.

A part may be any callable: a module, a plain object, a closure, a bound method. PyTorch looks for
modules only in the attributes of modules, so it misses modules that a plain object holds. The
functions here follow plain attributes, containers and closures as well.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeGuard

from torch import Tensor, nn

from hamblocks.protocols import PARTS, Controller

Edge = tuple[str, object]
"""A dotted path from the root of a walk, and the object at its end."""

Enter = Callable[[str, object], bool]
"""Called with the path and value of every object; returns whether to walk into the object."""

CAPTURED = "<captured>"
"""Path component for a variable that a closure captured, or the object of a bound method."""

MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
"""Attributes that every module has: parameters, buffers, children and hooks."""

ATOMS = (Tensor, type, types.ModuleType, str, bytes, int, float, complex, type(None))
"""Types of objects that a walk skips."""

CONTAINERS = (dict, list, tuple, set, frozenset, deque, functools.partial, types.SimpleNamespace)
"""Types of the standard library that may hold user-defined objects."""

LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}
"""Top-level packages whose objects hold no part: dtypes, optimizers, loggers, locks, ..."""


def is_controller(value: object) -> TypeGuard[Controller]:
    """Whether an object is a `hamblocks.protocols.Controller` that can be stepped.

    It is callable, and its class or its `__dict__` has a method `step` that needs no argument. A
    recurrent module with `step(x, state)` is not a controller, and neither is a wrapper that
    forwards `step` to the wrapped module by `__getattr__`.
    """
    has_step = hasattr(type(value), "step") or "step" in getattr(value, "__dict__", {})
    if not has_step or isinstance(value, type) or not isinstance(value, Controller):
        return False
    if not callable(value.step):
        return False
    try:
        arguments = inspect.signature(value.step).parameters.values()
    except (TypeError, ValueError):  # the callable has no signature
        return True
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(
        argument.default is not inspect.Parameter.empty or argument.kind in variadic
        for argument in arguments
    )


def find_controllers(root: object) -> list[Controller]:
    """All controllers that can be reached from an object, each once, in a fixed order.

    The walk follows the children and plain attributes of modules, `__dict__` and `__slots__` of
    plain objects, tuples, lists, sets, values of dicts, bound methods, `functools.partial`, and the
    closures, defaults and attributes of functions. It does not look into tensors, Python modules,
    classes, or objects of torch, numpy and the standard library.

    A controller inside another one is not listed, because the `step()` of the outer one steps the
    inner one.
    """
    found: list[Controller] = []

    def enter(path: str, value: object) -> bool:
        if is_controller(value):
            found.append(value)
            return False
        return True

    _walk([("", root)], enter)
    return _outermost(found)


def model_controllers(model: nn.Module) -> list[Controller]:
    """The controllers that `hamblocks.step_controllers(model)` steps, each once, in a fixed order.

    These are the modules of `model` that are controllers, and what `find_controllers` finds in the
    parts of its layers. A layer is any module with an attribute `selector`. Elsewhere plain
    attributes are not followed, because they may lead to a trainer or a data set. `model` itself is
    never in the list, because it may have an unrelated method `step`.
    """
    found: list[Controller] = []
    parts: list[object] = []
    holders: dict[int, bool] = {}
    is_plain = not _holds_layer(model, holders)

    def enter(value: object) -> bool:
        if value is not model and is_controller(value) and not _holds_layer(value, holders):
            found.append(value)
            return False
        return True

    def enter_module(path: str, value: object) -> bool:
        if not enter(value):
            return False
        parts.extend(_parts(value))
        return True

    def enter_part(path: str, value: object) -> bool:
        # A part may refer to the model that it belongs to. The layers of the model are walked
        # separately, so the walk does not enter it from here.
        return enter(value) and (is_plain or not _holds_layer(value, holders))

    _walk([("", model)], enter_module, _children)
    roots = [("", part) for part in ([model] if is_plain else parts)]
    _walk(roots, enter_part, seen={id(controller): controller for controller in found})
    return _outermost(found)


def _outermost(found: list[Controller]) -> list[Controller]:
    """Drops controllers that are inside others; of two that hold each other, keeps the first."""
    contents: list[dict[int, object]] = []
    for controller in found:
        held: dict[int, object] = {}
        _walk(_edges(controller), lambda path, value: not _holds_layer(value, {}), seen=held)
        contents.append(held)
    return [
        controller
        for i, controller in enumerate(found)
        if not any(
            id(controller) in held and (j < i or id(found[j]) not in contents[i])
            for j, held in enumerate(contents)
            if j != i and held
        )
    ]


def hidden_modules(part: object) -> dict[str, nn.Module]:
    """The modules in a part that PyTorch does not find, by dotted path from the part.

    `.train()`, `.to()`, `.parameters()` and `.state_dict()` of the layer do not reach them unless
    the layer registers them. Submodules of a listed module are not listed. A module that a closure
    captured, or that a bound method belongs to, is listed only if it is a controller, because it
    may be the model that will contain the layer.

    Returns:
        For example `{"tau_source": TargetFraction(...)}`; empty if PyTorch finds all modules.
    """
    found: dict[str, nn.Module] = {}
    registered = set(map(id, part.modules())) if isinstance(part, nn.Module) else set()

    def enter(path: str, value: object) -> bool:
        if not isinstance(value, nn.Module) or id(value) in registered:
            return True
        *_, last = f".{path}".split(".")
        if last.startswith(CAPTURED) and not is_controller(value):
            return False
        found[path.replace(CAPTURED, "")] = value
        registered.update(map(id, value.modules()))
        return True

    _walk([("", part)], enter)
    return found


def _is_layer(module: nn.Module) -> bool:
    return "selector" in module._modules or "selector" in vars(module)


def _holds_layer(value: object, holders: dict[int, bool]) -> bool:
    """Whether a module is a layer or contains one; `holders` caches the answers by id."""
    if not isinstance(value, nn.Module):
        return False
    answer = holders.get(id(value))
    if answer is None:
        children = [child for child in value._modules.values() if child is not None]
        answer = _is_layer(value) or any(_holds_layer(child, holders) for child in children)
        holders[id(value)] = answer
    return answer


def _parts(value: object) -> list[object]:
    """The parts of a layer, or the controller of a selector that is used without a layer."""
    if not isinstance(value, nn.Module):
        return []
    names = ["controller"]
    if _is_layer(value):
        names += PARTS
    held = (value._modules.get(name, vars(value).get(name)) for name in names)
    return [part for part in held if part is not None]


def _walk(
    roots: Iterable[Edge],
    enter: Enter,
    edges: Callable[[object], Iterable[Edge]] | None = None,
    *,
    seen: dict[int, object] | None = None,
) -> None:
    """Walks depth first from the roots. Visits every object once, before the objects it holds.

    `seen` maps ids of visited objects to the objects. This keeps them alive, because Python may
    reuse the id of an object that is gone.
    """
    seen = {} if seen is None else seen
    edges = _edges if edges is None else edges
    stack = [("", iter(roots))]
    while stack:
        prefix, level = stack[-1]
        for name, value in level:
            if id(value) in seen or _is_atom(value):
                continue
            seen[id(value)] = value
            path = f"{prefix}.{name}" if prefix else name
            if enter(path, value):
                stack.append((path, iter(edges(value))))
                break
        else:
            stack.pop()


@functools.lru_cache(maxsize=4096)
def _is_atomic(kind: type) -> bool:
    """Whether a walk skips objects of this type."""
    if issubclass(kind, ATOMS):
        return True
    if issubclass(kind, (nn.Module, types.FunctionType, types.MethodType)):
        return False
    package = kind.__module__.partition(".")[0]
    return package in LIBRARIES and kind not in CONTAINERS and not issubclass(kind, dict)


def _is_atom(value: object) -> bool:
    kind = type(value)
    if kind is types.FunctionType:
        return (value.__module__ or "").partition(".")[0] in LIBRARIES
    return _is_atomic(kind)  # type: ignore[arg-type]  # mypy takes a type for no hashable


def _children(value: object) -> Iterable[Edge]:
    """The children of a module."""
    return value._modules.items() if isinstance(value, nn.Module) else ()


def _edges(value: object) -> Iterator[Edge]:
    """The objects that an object holds, by name."""
    if isinstance(value, nn.Module):
        yield from value._modules.items()
    elif isinstance(value, types.FunctionType):
        yield from _captured(value)
    elif isinstance(value, types.MethodType):
        yield CAPTURED + "__self__", value.__self__
        yield "__func__", value.__func__
    elif isinstance(value, functools.partial):
        yield "func", value.func
        yield from _numbered(value.args)
        yield from value.keywords.items()
    elif isinstance(value, dict):
        yield from ((str(key), x) for key, x in value.items() if not _is_atom(x))
    elif isinstance(value, (set, frozenset)):
        yield from _numbered(sorted((x for x in value if not _is_atom(x)), key=_order))
    elif isinstance(value, (list, tuple, deque)):
        yield from _numbered(value)
    yield from _attributes(value)


def _numbered(values: Iterable[object]) -> Iterator[Edge]:
    return ((str(index), value) for index, value in enumerate(values))


def _captured(function: types.FunctionType) -> Iterator[Edge]:
    """The variables in the closure of a function, and the defaults of its arguments."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield CAPTURED + name, cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    yield from _numbered(function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def _attributes(value: object) -> Iterator[Edge]:
    """Attributes in `__dict__` and `__slots__`, without those that every module has."""
    skipped: Collection[str] = MODULE_ATTRIBUTES if isinstance(value, nn.Module) else ()
    for name, entry in getattr(value, "__dict__", {}).items():
        if name not in skipped:
            yield name, entry
    for name, slot in _slots(type(value)):  # type: ignore[arg-type]  # as in _is_atom
        try:
            yield name, slot.__get__(value)
        except AttributeError:  # the slot is empty
            continue


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> list[tuple[str, types.MemberDescriptorType]]:
    """The `__slots__` of a class and its bases, without those of library classes."""
    own = (base for base in kind.__mro__ if base.__module__.partition(".")[0] not in LIBRARIES)
    slots = ((name, slot) for base in own for name, slot in vars(base).items())
    return [(name, slot) for name, slot in slots if isinstance(slot, types.MemberDescriptorType)]


def _order(value: object) -> tuple[str, str]:
    """Sort key for members of a set. Sets iterate in an order that differs between processes."""
    kind = type(value)
    shown = "" if kind.__repr__ is object.__repr__ else repr(value)
    return f"{kind.__module__}.{kind.__qualname__}", shown
