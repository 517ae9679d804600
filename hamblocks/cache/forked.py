"""Locks in a process that was forked while another thread held them.

Only the thread that forks exists in the new process. A lock that another thread held is never
released there, and the data that it guards may be half changed. So acquiring it raises an error
instead of waiting forever.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol
from weakref import WeakSet


class _Guarded(Protocol):
    """Whatever has a reentrant lock as its attribute `lock`."""

    lock: threading.RLock


class _Lost:
    """Takes the place of a lock that nobody will release."""

    def __enter__(self) -> None:
        raise RuntimeError(
            "state: expected one that no thread was reading or changing when this process was "
            "forked, got one that a call of another thread was using; send it before that call, or "
            "start the process by spawn"
        )

    def __exit__(self, *_: object) -> None: ...


_guarded: WeakSet[_Guarded] = WeakSet()


def watch(guarded: _Guarded) -> None:
    """Replaces the lock of an object in a forked process where another thread held it."""
    _guarded.add(guarded)


def _after_fork() -> None:
    for one in list(_guarded):
        if isinstance(one.lock, _Lost):
            continue
        if one.lock.acquire(blocking=False):
            one.lock.release()
        else:
            one.lock = _Lost()  # type: ignore[assignment]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
