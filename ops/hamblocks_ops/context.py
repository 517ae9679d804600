"""What callers of ops may switch for a while: argument checks, and a record of what was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from hamblocks_ops.dispatch import Explanation

CHECKED: ContextVar[bool] = ContextVar("hamblocks_arguments_are_checked", default=False)
"""Whether the caller vouches for the arguments of every op, which then checks none."""

CHOICES: ContextVar[list[Choice] | None] = ContextVar("hamblocks_choices", default=None)
"""Where ops record which implementation they choose; None: nowhere."""


class Choice(NamedTuple):
    """One call of an op with a choice of implementations.

    Attributes:
        op: its name.
        impl: what the call named, or "auto".
        explanation: what every implementation answers to the call.
    """

    op: str
    impl: str
    explanation: Explanation


@contextlib.contextmanager
def arguments_are_checked() -> Iterator[None]:
    """Within this context ops check no argument: the caller has checked them all.

    A layer that checked its input, and what its parts return, runs hamblocks' own parts in it. A
    bad argument is then undefined behaviour: an error of torch, or a wrong result.
    """
    token = CHECKED.set(True)
    try:
        yield
    finally:
        CHECKED.reset(token)


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Within this context every op that chooses an implementation records what it chooses from."""
    choices: list[Choice] = []
    token = CHOICES.set(choices)
    try:
        yield choices
    finally:
        CHOICES.reset(token)
