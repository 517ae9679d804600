"""How many cases a check draws: dev while you write, ci the same ones every time, nightly many."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import NamedTuple

from hamblocks_ops.arguments import wrong


class Profile(NamedTuple):
    """A size of run.

    Attributes:
        name: dev, ci or nightly.
        examples: cases drawn by each check.
        derandomize: draw the same cases every time.
    """

    name: str
    examples: int
    derandomize: bool


PROFILES = {
    "dev": Profile("dev", 10, False),
    "ci": Profile("ci", 20, True),
    "nightly": Profile("nightly", 500, False),
}
"""By name."""

chosen: ContextVar[str | None] = ContextVar("hamblocks_profile", default=None)
"""What pytest was told by --hamblocks-profile."""


def current(profile: str | Profile | None = None) -> Profile:
    """The profile of that name; None: pytest's --hamblocks-profile, else ci where the environment says CI, else dev.

    Raises:
        ValueError: no profile has that name.
    """
    if isinstance(profile, Profile):
        return profile
    name = profile or chosen.get() or ("ci" if os.environ.get("CI") else "dev")
    if name not in PROFILES:
        raise wrong("profile", "one of " + ", ".join(PROFILES), repr(name))
    return PROFILES[name]
