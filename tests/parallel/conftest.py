"""The processes that the tests of several ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Workers


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives all tests of ranks to one worker of pytest-xdist: processes are started once."""
    if item.path.is_relative_to(Path(__file__).parent):
        item.add_marker(pytest.mark.xdist_group("ranks"))


class _Keeper:
    """Makes the processes when a test asks, and anew after one has failed."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory, self.workers = factory, None

    def get(self) -> Workers:
        if self.workers is None or not self.workers.alive:
            self.close()
            self.workers = Workers(self.factory.mktemp("ranks"))
        return self.workers

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()


@pytest.fixture(scope="session")
def keeper(tmp_path_factory):
    kept = _Keeper(tmp_path_factory)
    yield kept
    kept.close()


@pytest.fixture
def workers(keeper) -> Workers:
    return keeper.get()
