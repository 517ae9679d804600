"""Parts that the command line names: `package.module:expression`."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import hamblocks_ops
from hamblocks.testing.suite import op_implementations
from hamblocks_ops.arguments import wrong


class _Names(dict[str, Any]):
    """The names of a module; one that it imports when it is used, as hamblocks does, is found."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(vars(module))
        self.module = module

    def __missing__(self, name: str) -> Any:
        try:
            return getattr(self.module, name)
        except AttributeError:  # perhaps a builtin
            raise KeyError(name) from None


def load(target: str) -> tuple[Any, str]:
    """Evaluates an expression in a module: the part, and the expression that makes it.

    A class is called without arguments. Modules are also found in the working directory.

    Args:
        target: `package.module:expression`.

    Raises:
        ValueError: the module cannot be imported, or the expression fails.
    """
    name, colon, expression = target.partition(":")
    if not colon or not name or not expression:
        expected = "package.module:expression, for example hamblocks:TopK(8)"
        raise wrong("target", expected, repr(target))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        expected = f"a module that can be imported before the colon ({error})"
        raise wrong("target", expected, repr(name)) from error
    try:
        part = eval(expression, _Names(module))
        return (part(), f"{expression}()") if isinstance(part, type) else (part, expression)
    except Exception as error:
        expected = f"an expression that makes a part in {name} ({type(error).__name__}: {error})"
        raise wrong("target", expected, repr(expression)) from error


def parts_of(
    kind: str, target: str, like: str | None = None, impl: str | None = None
) -> list[tuple[Any, str]]:
    """The parts that a target names, each with the expression that makes it.

    It is one part, or all implementations of an op of `hamblocks.ops`.

    Args:
        kind: kind of the part.
        target: `package.module:expression`.
        like: name of the op of `hamblocks.ops` that the target implements; kind "op" only.
        impl: name of one implementation of the op that is the target; kind "op" only.

    Raises:
        ValueError: the target is wrong, or `like` or `impl` is given for another kind.
    """
    part, called = load(target)
    if kind != "op":
        for name, value in (("like", like), ("impl", impl)):
            if value is not None:
                raise wrong(name, f"None for a {kind}", repr(value))
        return [(part, called)]
    op = None if like is None else getattr(hamblocks_ops, like, None)
    if like is not None and op is None:
        raise wrong("like", "the name of an op of hamblocks.ops", repr(like))
    found = op_implementations(part, op, only=[] if impl is None else [impl])
    if not found:
        raise wrong("impl", f"one of {', '.join(hamblocks_ops.implementations(part))}", repr(impl))
    return [(one, repr(one)) for one in found]
