"""What a clone must not carry: things of one machine."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("these are not the files of a clone")
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_nothing_that_is_made_is_tracked() -> None:
    """A link named .venv was once, which `.venv/` does not keep out: no other machine could build."""
    assert _git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_no_link_is_tracked() -> None:
    """None leads anywhere in a wheel, or on another machine."""
    assert [line for line in _git("ls-files", "--stage") if line.startswith("120000")] == []
