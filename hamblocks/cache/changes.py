"""Transactions: changes of several caches that are applied together or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Change(Protocol):
    """A planned change: it was checked and its pages are reserved, so applying it cannot fail."""

    def apply(self) -> None:
        """Makes the change."""
        ...

    def drop(self) -> None:
        """Releases the pages that were reserved for the change."""
        ...


_open: ContextVar[list[Change] | None] = ContextVar("open_transaction", default=None)


@contextlib.contextmanager
def cache_transaction() -> Iterator[None]:
    """Context in which changes of caches are delayed, and applied together at its end.

    If the context ends with an exception, no change is applied. A model runs its layers inside it,
    so that an error in the third layer leaves the caches of the first two unchanged. A transaction
    inside another one has no effect of its own: changes are applied at the end of the outermost
    one. Each cache can change at most once in a transaction.
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
    """Context in which changes of caches are planned as usual, and dropped at its end."""
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
