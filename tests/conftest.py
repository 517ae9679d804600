"""One thread per worker; for every test random numbers of its own, poisoned memory, and the suite's
hypothesis profile."""

from __future__ import annotations

import os
import zlib
from typing import Any

import hypothesis
import pytest
import torch

INTERPRETED = ("triton", "fla")

if not torch.cuda.is_available():  # Triton reads it once, when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from hamblocks.testing import settings  # noqa: E402 - it registers the profiles with hypothesis


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--hamblocks-profile")
    if not (given or config.getoption("hypothesis_profile", None)):
        # The same cases on every machine: what fails for one fails for all. Fewer than in "ci",
        # because hundreds of parts run the same checks; `make alarms` draws more.
        suite = settings.Profile("suite", examples=10, derandomize=True)
        hypothesis.settings.register_profile(
            "suite", hypothesis.settings.get_profile("hamblocks-ci"), max_examples=suite.examples
        )
        hypothesis.settings.load_profile("suite")
        settings.choose(settings.chosen()._replace(profile=suite))
    from hamblocks_ops.dispatch import interpreting

    if interpreting():
        from hamblocks.testing.interpreter import mend

        mend()
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


LEFT_OUT = {
    # Compiling thirty layers or selectors takes minutes. tests/parts/test_one_graph.py compiles every
    # selector, and layers.
    "compiled_is_eager": ("test_selectors", "test_layers_of_every_part"),
    # The layers of `parts_cases.CASES` have every part, and run the same laws.
    "works_in_a_layer": ("test_small_parts", "test_selectors", "test_memory_and_attention"),
}
"""Laws that tests of tests/testing/test_ours.py leave out, because others cover them."""


def _is_left_out(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return True
    check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
    law = getattr(getattr(check, "check", None), "law", None)
    tests = LEFT_OUT.get(law, ())
    return item.path.name == "test_ours.py" and getattr(item, "originalname", None) in tests


GROUPS = {
    "tests/parallel/": "ranks",  # which share processes
    "tests/hf/test_smollm2.py": "checkpoint",  # which takes half a minute to load
    "tests/test_site.py": "site",  # which takes some seconds to build
}
"""Tests that one worker of pytest-xdist runs, by the beginning of their names.

xdist 3.8 writes the groups of `xdist_group` into a name that pytest 9.2 does not read.
"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of `--dist loadgroup`, with `GROUPS`."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            found = (group for name, group in GROUPS.items() if nodeid.startswith(name))
            return next(found, nodeid)

    return Grouped(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what is left out, and marks checks of interpreted Triton kernels as slow."""
    left_out = [item for item in items if _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _is_left_out(item)]
    for item in items:
        check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
        if getattr(getattr(check, "part", None), "impl", None) in (
            *INTERPRETED,
            "flex",
            "flex-compact",
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers in every run, whichever tests run before."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poisoned_memory(hamblocks_poisoned_memory: None) -> None:
    """Applies the fixture to every test."""
