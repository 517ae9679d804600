"""The processes that the tests of several ranks share."""

from __future__ import annotations

import pytest
from ranks import Workers


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
