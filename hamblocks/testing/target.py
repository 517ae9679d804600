"""A part named on the command line: `package.module:expression`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import hamblocks_ops
from hamblocks.testing.suite import op_implementations
from hamblocks_ops.arguments import wrong


def load(target: str) -> tuple[Any, str]:
    """The part and the expression that makes it, evaluated in the module; a class is called without arguments.

    Modules are looked for in the working directory too.

    Raises:
        ValueError: no such module, or the expression fails.
    """
    name, colon, expression = target.partition(":")
    if not colon or not name or not expression:
        raise wrong("target", "package.module:expression, e.g. hamblocks:TopK(8)", repr(target))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise wrong(
            "target", f"a module that can be imported before the colon ({error})", repr(name)
        ) from error
    try:
        part = eval(expression, dict(vars(module)))
        return (part(), f"{expression}()") if isinstance(part, type) else (part, expression)
    except Exception as error:
        what = f"an expression that makes a part in {name} ({type(error).__name__}: {error})"
        raise wrong("target", what, repr(expression)) from error


def parts_of(
    kind: str, target: str, like: str | None = None, impl: str | None = None
) -> list[tuple[Any, str]]:
    """The parts, each with the expression that makes it: one, or all implementations of an op of ours.

    Raises:
        ValueError: a bad target, or `like` and `impl` for something that is no op.
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
