"""A store in a folder of its own, and the two applications around it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI

from ktransformers.server.app import make_admin_app
from ktransformers.server.auth import AdminKeys
from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Limiter
from ktransformers.server.tenants.records import NO_LIMITS, Limits, Project
from ktransformers.server.tenants.store import Store


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Office:
    """The store as the command line has it, and applications of a server that follows it."""

    def __init__(self, folder: Path, make: Callable[..., FastAPI]) -> None:
        self.folder = folder
        self.store = Store.open(folder)
        self.directory = Directory.open(folder)
        self.clock = Clock()
        self.limiter = Limiter({}, self.clock)
        self.ledger = Ledger(
            lambda at, rows, used: self.directory.post(lambda store: store.usage.add(at, rows, used))
        )
        self._make = make

    def tenant(self, name: str, limits: Limits = NO_LIMITS, **key: object) -> tuple[Project, str]:
        """A new project and a key of it."""
        project = self.store.create_project(name, "test", limits=limits)
        account = self.store.create_account(project.id, "user", "test")
        return project, self.store.create_key(account, "user", "test", **key)[1]

    def admin(self) -> str:
        return self.store.create_key(None, "boss", "test")[1]

    def follow(self) -> None:
        """Wait until the server has seen what the store holds (it promises a second)."""
        projects, _, keys, _ = self.store.load()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            view = self.directory.view
            if list(view.projects.values()) == projects and set(view.keys) == {k.digest for k in keys}:
                return
            time.sleep(0.01)
        raise AssertionError("the server did not follow")

    def app(self, **settings: object) -> FastAPI:
        return self._make(directory=self.directory, limiter=self.limiter, ledger=self.ledger, **settings)

    def admin_app(self, app: FastAPI) -> FastAPI:
        return make_admin_app(replace(app.state.service, keys=AdminKeys(self.directory)))


@pytest.fixture
def office(tmp_path: Path, make: Callable[..., FastAPI]) -> Iterator[Office]:
    office = Office(tmp_path / "tenants", make)
    yield office
    office.directory.close()
    office.store.close()
