"""Fixtures of the cache's tests."""

import importlib.util
import sys
import tempfile
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
def in_memory(tmp_path):
    """A folder in memory, if there is such a filesystem: what is killed leaves the same there, and sooner."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as name:
        yield Path(name)
