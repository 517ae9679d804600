"""The pytest plugin: options, marks and fixtures for suites that use `hamblocks.testing`.

pytest imports this module at the start of every run in an environment where hamblocks is installed.
It therefore imports neither torch nor hypothesis nor the checks, until a suite uses them or an
option of this plugin is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hamblocks.testing.parametrize import BoundCheck

PROFILES = ("dev", "ci", "nightly")
"""The names in `hamblocks.testing.PROFILES`, which is not imported for the help text alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers the options."""
    group = parser.getgroup("hamblocks", "checks of hamblocks.testing")
    group.addoption(
        "--hamblocks-profile",
        choices=PROFILES,
        help="how many cases a check draws: dev 10, ci 20 (the same in every run), nightly 500; "
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
        help="run checks of ops, and tests that take the fixture hamblocks_impl, over these "
        "implementations alone; may be given several times",
    )
    group.addoption(
        "--hamblocks-device",
        metavar="DEVICE",
        help="run the implementations that checks of ops test on this device, for example cuda; "
        "inputs and references stay on the CPU",
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis looks for the profile that its option names
def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks, and puts the options into force where any is given."""
    config.addinivalue_line(
        "markers", "hamblocks_slow: a check of hamblocks.testing that takes seconds"
    )
    config.addinivalue_line(
        "markers",
        "hamblocks_op(name): the op whose implementations the fixture hamblocks_impl takes",
    )
    if _options_given(config) or _in_use():
        try:
            import_module("hamblocks.testing")  # it registers the profiles with hypothesis
        except ImportError as error:
            raise pytest.UsageError(str(error)) from error
        _apply_options(config)


def _in_use() -> bool:
    """Whether the checks are imported already, as in a pytest run inside another one."""
    return "hamblocks.testing.settings" in sys.modules


def _options_given(config: pytest.Config) -> bool:
    own = ("profile", "seed", "impl", "device")
    given = any(config.getoption(f"--hamblocks-{name}") not in (None, []) for name in own)
    return given or str(config.getoption("--hypothesis-profile", None)).startswith("hamblocks-")


def _apply_options(config: pytest.Config) -> None:
    """Puts the options into force until this run of pytest ends."""
    import hypothesis

    from hamblocks.testing import settings

    names = _implementation_names()
    for given in config.getoption("--hamblocks-impl"):
        if given.rpartition("=")[2] not in names:
            expected = f"[OP=] one of {', '.join(sorted(names))}"
            raise pytest.UsageError(f"--hamblocks-impl: expected {expected}, got {given}")
    profile = config.getoption("--hamblocks-profile")
    seed = config.getoption("--hamblocks-seed")
    device = config.getoption("--hamblocks-device") or "cpu"
    try:
        before = settings.choose(settings.Settings(profile, seed, device))
    except ValueError as error:
        raise pytest.UsageError(f"--hamblocks-{error}") from error
    config.add_cleanup(lambda: _restore(before))
    if profile is not None:  # for the suite's own hypothesis tests too
        hypothesis.settings.load_profile(f"hamblocks-{profile}")


def _restore(before: Any) -> None:
    from hamblocks.testing import settings

    settings.choose(before)


def _implementation_names() -> set[str]:
    from hamblocks.testing.ops import OPS
    from hamblocks_ops import implementations

    return {name for op in OPS for name in implementations(op)}


def _chosen_implementations(config: pytest.Config, op: Any) -> list[str]:
    """Names that --hamblocks-impl gives for an op; empty: no choice was made."""
    names = []
    for given in config.getoption("--hamblocks-impl"):
        of, _, name = given.rpartition("=")
        if of in ("", op.__name__):
            names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes the fixture hamblocks_impl over the op that the mark hamblocks_op names."""
    if "hamblocks_impl" not in metafunc.fixturenames:
        return
    from hamblocks.testing.ops import OPS
    from hamblocks_ops import implementations

    mark = metafunc.definition.get_closest_marker("hamblocks_op")
    by_name = {op.__name__: op for op in OPS}
    op = by_name.get(mark.args[0]) if mark is not None and mark.args else None
    if op is None:
        needed = f"@pytest.mark.hamblocks_op(name), name one of {', '.join(by_name)}"
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: hamblocks_impl needs {needed}")
    wanted = _chosen_implementations(metafunc.config, op)
    names = [name for name in implementations(op) if not wanted or name in wanted]
    metafunc.parametrize("hamblocks_impl", names)


def bound_check(item: pytest.Item) -> BoundCheck | None:
    """The check that a test of `parametrize_with_checks` runs; None for other tests."""
    if "hamblocks.testing.parametrize" not in sys.modules:
        return None  # then no test can have one
    from hamblocks.testing.parametrize import BoundCheck

    check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
    return check if isinstance(check, BoundCheck) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the checks of implementations that --hamblocks-impl does not name."""
    if not config.getoption("--hamblocks-impl"):
        return
    left = [item for item in items if not _is_chosen(config, item)]
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def _is_chosen(config: pytest.Config, item: pytest.Item) -> bool:
    from hamblocks.testing.ops import OpImplementation

    check = bound_check(item)
    part = None if check is None else check.part
    if not isinstance(part, OpImplementation) or part.run is not None:
        return True
    chosen = _chosen_implementations(config, part.like)
    return not chosen or part.impl in chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tells every check which other checks of its part this run selects (see `BoundCheck`)."""
    for item in session.items:
        check = bound_check(item)
        if check is not None:
            check.of_part.selected.add(check.check.name)


@pytest.fixture
def hamblocks_poisoned_memory() -> Iterator[None]:
    """While the test runs, unwritten memory is NaN (integers: the largest number).

    A result that depends on it is then wrong for sure. It is torch's own deterministic mode, which
    also reaches memory that kernels allocate for themselves.
    """
    import torch

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
