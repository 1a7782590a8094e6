"""The tenants as the server sees them: it follows what other processes write."""

import time
from pathlib import Path
from typing import Any

import pytest

from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.store import Store


def test_what_is_written_while_it_opens_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Store.open(tmp_path / "t"), Store.open(tmp_path / "t")
    load = ours.load

    def load_then_late() -> Any:
        found = load()
        if not found[0]:
            theirs.create_project("late", "test")
        return found

    monkeypatch.setattr(ours, "load", load_then_late)
    directory = Directory(ours)
    assert not directory.view.projects
    end = time.monotonic() + 60
    while not directory.view.projects:
        assert time.monotonic() < end, "what came between the first look and the second was never seen"
        time.sleep(0.01)
    directory.close()
    theirs.close()
