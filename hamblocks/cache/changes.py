"""Transactions: changes of several caches that are applied together or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol, final


class Change(Protocol):
    """A planned change: it was checked and its pages are reserved, so applying it cannot fail."""

    def apply(self) -> None:
        """Makes the change."""
        ...

    def drop(self) -> None:
        """Releases the pages that were reserved for the change."""
        ...


@final
class _Transaction:
    """The changes that wait for the end of a transaction.

    Attributes:
        changes: in the order in which they were planned.
        open: False after the end. A task that was started inside a transaction still finds it in
            its own copy of the context; a change that was queued there would never be applied.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.open = True


_current: ContextVar[_Transaction | None] = ContextVar("open_transaction", default=None)


@contextlib.contextmanager
def cache_transaction() -> Iterator[None]:
    """Context in which changes of caches are delayed, and applied together at its end.

    If the context ends with an exception, no change is applied. A model runs its layers inside it,
    so that an error in the third layer leaves the caches of the first two unchanged. A transaction
    inside another one has no effect of its own: changes are applied at the end of the outermost
    one. Each cache can change at most once in a transaction. Every thread has transactions of its
    own.
    """
    outer = _current.get()
    if outer is not None and outer.open:
        yield
        return
    with _collecting() as transaction:
        try:
            yield
        except BaseException:
            transaction.open = False
            for change in transaction.changes:
                change.drop()
            raise
    for change in transaction.changes:
        change.apply()


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Context in which changes of caches are planned as usual, and dropped at its end."""
    with _collecting() as transaction:
        try:
            yield
        finally:
            transaction.open = False
            for change in transaction.changes:
                change.drop()


@contextlib.contextmanager
def apply_at_once() -> Iterator[None]:
    """Context in which changes are applied at once, for caches that exist for one call only."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def _collecting() -> Iterator[_Transaction]:
    """Context in which `apply_or_queue` queues changes in the transaction that it gives."""
    transaction = _Transaction()
    token = _current.set(transaction)
    try:
        yield transaction
    finally:
        transaction.open = False
        _current.reset(token)


def apply_or_queue(change: Change) -> None:
    """Applies a change now, or when the open transaction ends."""
    transaction = _current.get()
    if transaction is None or not transaction.open:
        change.apply()
    else:
        transaction.changes.append(change)
