"""Parts and ops that are wrong in one way each, with the check that must reject them.

Each is a mistake that somebody makes. Most run, have the right shapes, and train in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Broken(NamedTuple):
    """A broken part.

    Attributes:
        check: name of the check that must reject it.
        name: its own name.
        factory: makes it, or returns the implementation of an op.
        like: the op that it implements; None for parts.
    """

    check: str
    name: str
    factory: Callable[[], Any]
    like: Callable[..., Any] | None = None


BROKEN: list[Broken] = []


def rejected_by(check: str) -> Callable[[Any], Any]:
    """Registers a class of parts, called without arguments, or a function that makes one."""

    def register(factory: Any) -> Any:
        BROKEN.append(Broken(f"check_{check}", factory.__name__, factory))
        return factory

    return register


def op_rejected_by(check: str, like: Callable[..., Any]) -> Callable[[Any], Any]:
    """Registers an implementation of an op."""

    def register(run: Any) -> Any:
        BROKEN.append(Broken(f"check_op_{check}", run.__name__, lambda: run, like))
        return run

    return register
