"""One thread per worker; hypothesis profiles of hamblocks and poisoned memory for every test."""

from __future__ import annotations

import os

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


def _is_left_out(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return True
    # Compiling thirty layers takes two minutes. Each part is compiled by a check of its own, and
    # layers by `test_layers` and tests/parts/test_one_graph.py.
    return "test_layers_of_every_part" in item.nodeid and "compiled_is_eager" in item.nodeid


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
        if getattr(getattr(check, "check", None), "law", None) == "works_in_a_layer":
            item.add_marker(pytest.mark.slow)  # the checks of layers run the same laws


@pytest.fixture(autouse=True)
def _poisoned_memory(hamblocks_poisoned_memory: None) -> None:
    """Applies the fixture to every test."""
