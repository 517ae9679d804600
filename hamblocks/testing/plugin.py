"""The pytest plugin, found through its entry point: profiles, seeds, chosen implementations, unwritten memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import hypothesis
import pytest
import torch

from hamblocks.testing import profiles
from hamblocks.testing.ops import OPS, OpImplementation, choose_device
from hamblocks.testing.parametrize import BoundCheck
from hamblocks.testing.profiles import PROFILES
from hamblocks_ops import implementations

chosen_seed: ContextVar[int | None] = ContextVar("hamblocks_seed", default=None)
"""What pytest was told by --hamblocks-seed."""

for _profile in (
    PROFILES.values()
):  # at import, before hypothesis looks for the one that --hypothesis-profile names
    hypothesis.settings.register_profile(
        f"hamblocks-{_profile.name}",
        max_examples=_profile.examples,
        derandomize=_profile.derandomize,
        deadline=None,
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("hamblocks", "checks of hamblocks.testing")
    group.addoption(
        "--hamblocks-profile",
        choices=list(PROFILES),
        help="how many cases a check draws: dev 10, ci 20 (the same every time), nightly 500; "
        "default: ci where the environment variable CI is set, else dev",
    )
    group.addoption(
        "--hamblocks-seed", type=int, help="draw other cases, the same ones for the same seed"
    )
    group.addoption(
        "--hamblocks-impl",
        action="append",
        default=[],
        metavar="[OP=]NAME",
        help="run checks of ops, and tests that take the fixture hamblocks_impl, over these implementations alone; "
        "may be given several times",
    )
    group.addoption(
        "--hamblocks-device",
        default="cpu",
        metavar="DEVICE",
        help="run what checks of ops are about on this device, say cuda; inputs and references stay on the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks; a profile that is asked for is that of the suite's own hypothesis tests, too."""
    config.addinivalue_line(
        "markers", "hamblocks_slow: a check of hamblocks.testing that takes seconds"
    )
    config.addinivalue_line(
        "markers",
        "hamblocks_op(name): the op whose implementations the fixture hamblocks_impl gives",
    )
    known = {name for op in OPS for name in implementations(op)}
    for given in config.getoption("--hamblocks-impl"):
        if given.rpartition("=")[2] not in known:
            raise pytest.UsageError(
                f"--hamblocks-impl: expected [OP=] one of {', '.join(sorted(known))}, got {given}"
            )
    name = config.getoption("--hamblocks-profile")
    profiles.chosen.set(name)
    try:
        choose_device(config.getoption("--hamblocks-device"))
    except ValueError as error:
        raise pytest.UsageError(f"--hamblocks-{error}") from error
    chosen_seed.set(config.getoption("--hamblocks-seed"))
    if name is not None:
        hypothesis.settings.load_profile(f"hamblocks-{name}")


def _chosen(config: pytest.Config, op: Any) -> list[str]:
    """Names given for an op by --hamblocks-impl, empty for no choice."""
    names = []
    for one in config.getoption("--hamblocks-impl"):
        of, _, name = one.rpartition("=")
        if of in ("", op.__name__):
            names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives the fixture hamblocks_impl the implementations of the op that the mark hamblocks_op names."""
    if "hamblocks_impl" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("hamblocks_op")
    by_name = {op.__name__: op for op in OPS}
    op = by_name.get(mark.args[0]) if mark is not None and mark.args else None
    if op is None:
        names = ", ".join(by_name)
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: hamblocks_impl needs @pytest.mark.hamblocks_op(name), one of {names}"
        )
    wanted = _chosen(metafunc.config, op)
    metafunc.parametrize(
        "hamblocks_impl", [name for name in implementations(op) if not wanted or name in wanted]
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the checks of implementations that were not chosen."""
    every = config.getoption("--hamblocks-impl")
    if not every:
        return
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
        part = check.part if isinstance(check, BoundCheck) else None
        chosen = (
            _chosen(config, part.like)
            if isinstance(part, OpImplementation) and part.run is None
            else []
        )
        (left if chosen and part is not None and part.impl not in chosen else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def hamblocks_poisoned_memory() -> Iterator[None]:
    """While the test runs, unwritten memory is NaN (integers: the largest number), so that reading it shows.

    It is torch's own deterministic mode, which reaches memory that kernels allocate for themselves, too.
    """
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    deterministic.fill_uninitialized_memory = filled
