"""Fixtures of the cache's tests."""

from types import ModuleType

import pytest
import stored_blocks


@pytest.fixture(scope="session")
def stored() -> ModuleType:
    """The module stored_blocks."""
    return stored_blocks


@pytest.fixture
def in_memory(stored):
    """An empty folder, in memory where that is possible."""
    with stored.in_memory() as folder:
        yield folder


@pytest.fixture
def reserve(stored, monkeypatch) -> None:
    """The reserve of the filesystem is what it is outside of tests."""
    for constant, value in zip(("RESERVE", "RESERVE_BYTES"), stored.REAL_RESERVE, strict=True):
        monkeypatch.setattr(stored.appender, constant, value)
