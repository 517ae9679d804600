"""Settings of the checks: how many cases they draw, with which seed, and on which device ops run.

The pytest plugin and the command line set them. Checks read them where a call does not say
otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import hypothesis
import torch

from hamblocks_ops.arguments import wrong


class Profile(NamedTuple):
    """How many cases a check draws.

    Attributes:
        name: "dev", "ci" or "nightly".
        examples: cases that each check draws.
        derandomize: whether every run draws the same cases.
    """

    name: str
    examples: int
    derandomize: bool


PROFILES = {
    "dev": Profile("dev", 10, False),
    "ci": Profile("ci", 20, True),
    "nightly": Profile("nightly", 500, False),
}
"""The profiles by name."""

# A suite's own hypothesis tests can take them too: --hypothesis-profile=hamblocks-ci.
for _profile in PROFILES.values():
    hypothesis.settings.register_profile(
        f"hamblocks-{_profile.name}",
        max_examples=_profile.examples,
        derandomize=_profile.derandomize,
        deadline=None,
    )


class Settings(NamedTuple):
    """What checks use where a call does not say otherwise.

    Attributes:
        profile: a profile or the name of one; None: "ci" where the environment variable CI is set,
            else "dev".
        seed: of the drawn cases; None: the profile decides whether cases differ from run to run.
        device: where implementations of ops run that name no device. References run on the CPU.
    """

    profile: str | Profile | None = None
    seed: int | None = None
    device: str = "cpu"


# the default is shared by all contexts, which is safe, as a NamedTuple cannot change
_chosen: ContextVar[Settings] = ContextVar("hamblocks_settings", default=Settings())  # noqa: B039


def chosen() -> Settings:
    """The settings in force."""
    return _chosen.get()


def choose(settings: Settings) -> Settings:
    """Puts settings into force, and returns those that were in force before.

    Raises:
        ValueError: no profile has that name, or this machine has no such device.
    """
    if settings.profile is not None:
        profile_of(settings.profile)
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError: torch without CUDA
        expected = f"one that is here ({str(error).splitlines()[0]})"
        raise wrong("device", expected, repr(settings.device)) from error
    before = _chosen.get()
    _chosen.set(settings)
    return before


@contextmanager
def using(settings: Settings) -> Iterator[None]:
    """Puts settings into force within a `with` block.

    Raises:
        ValueError: as `choose`.
    """
    before = choose(settings)
    try:
        yield
    finally:
        choose(before)


def profile_of(profile: str | Profile | None = None) -> Profile:
    """The profile with this name; None: the chosen one, else "ci" under CI, else "dev".

    Raises:
        ValueError: no profile has that name.
    """
    name = profile or chosen().profile or ("ci" if os.environ.get("CI") else "dev")
    if isinstance(name, Profile):
        return name
    if name not in PROFILES:
        raise wrong("profile", "one of " + ", ".join(PROFILES), repr(name))
    return PROFILES[name]
