"""Fixtures of the cache's tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Test files are no package (import-mode importlib); what they share lies beside them.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def stored() -> ModuleType:
    """The module stored_blocks."""
    if "stored_blocks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "stored_blocks", Path(__file__).parent / "stored_blocks.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["stored_blocks"] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
    return sys.modules["stored_blocks"]


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
