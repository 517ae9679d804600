"""Changes of several caches that take effect together or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Change(Protocol):
    """A change that was checked, has all that it needs, and can no longer fail."""

    def apply(self) -> None:
        """Makes the change."""
        ...

    def drop(self) -> None:
        """Gives back what the change was promised."""
        ...


_open: ContextVar[list[Change] | None] = ContextVar("open_transaction", default=None)


@contextlib.contextmanager
def cache_transaction() -> Iterator[None]:
    """Within this context caches do not change; all changes are made at its end.

    If the context ends by an exception, no change is made. A model wraps the run over its layers in
    it, so that an error in the third layer leaves the caches of the first two as they were. Inside
    an open transaction it does nothing: the outermost one decides. A cache may change once in it.
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


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Within this context changes of caches are planned as ever, and dropped at its end."""
    changes: list[Change] = []
    token = _open.set(changes)
    try:
        yield
    finally:
        _open.reset(token)
        for change in changes:
            change.drop()


def apply_or_queue(change: Change) -> None:
    """Applies a change now, or when the open transaction ends."""
    changes = _open.get()
    if changes is None:
        change.apply()
    else:
        changes.append(change)
