"""Parts and ops that are wrong in one way each, with the check that is meant to reject them.

Each is a mistake that somebody makes: it works, its shapes are right, a model trains with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Broken(NamedTuple):
    check: str
    name: str
    make: Callable[[], Any]
    like: Callable[..., Any] | None = None


BROKEN: list[Broken] = []


def rejected_by(check: str) -> Callable[[Any], Any]:
    """Registers a class of parts, called without arguments, or a function that makes one."""

    def register(make: Any) -> Any:
        BROKEN.append(Broken(f"check_{check}", make.__name__, make))
        return make

    return register


def op_rejected_by(check: str, like: Callable[..., Any]) -> Callable[[Any], Any]:
    """Registers an implementation of an op."""

    def register(run: Any) -> Any:
        BROKEN.append(Broken(f"check_op_{check}", run.__name__, lambda: run, like))
        return run

    return register
