"""Changes of several caches that take effect together or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Change(Protocol):
    """A change that was checked, has all that it needs, and can no longer fail."""

    def apply(self) -> None:
        """Makes it."""
        ...

    def drop(self) -> None:
        """Gives back what it was promised."""
        ...


_open: ContextVar[list[Change] | None] = ContextVar("open_transaction", default=None)


@contextlib.contextmanager
def cache_transaction() -> Iterator[None]:
    """Within this context caches do not change; at its end all changes are made, and none if it ends by an exception.

    A model wraps the run over its layers in it, so that an error in the third leaves the caches of the first two as
    they were. Inside one that is open already it does nothing: the outermost decides. A cache changes once in it.
    """
    if _open.get() is not None:
        yield
        return
    changes: list[Change] = []
    token = _open.set(changes)
    try:
        yield
    except BaseException:
        for change in changes:
            change.drop()
        raise
    finally:
        _open.reset(token)
    for change in changes:
        change.apply()


def make(change: Change) -> None:
    """Makes a change, now or when the transaction ends."""
    changes = _open.get()
    if changes is None:
        change.apply()
    else:
        changes.append(change)
