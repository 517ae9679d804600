"""One thread per worker, and for every test what the pytest plugin of hamblocks offers: profiles, poisoned memory."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if not (config.getoption("hypothesis_profile", None) or config.getoption("--hamblocks-profile")):
        hypothesis.settings.load_profile("hamblocks-ci" if os.environ.get("CI") else "hamblocks-dev")
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory(hamblocks_poisoned_memory: None) -> None:
    """For every test."""
