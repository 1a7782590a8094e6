"""What the tests of the engine share."""

from types import ModuleType

import fake_engine
import pytest
import small_programs


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module fake_engine."""
    return fake_engine


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The module small_programs."""
    return small_programs
