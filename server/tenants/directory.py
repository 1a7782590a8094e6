"""The tenants as the event loop sees them: a view of the store in memory, at most a second old.

One thread owns the connection. It does what it is handed (acts of administrators, the ledger's batches) and
in between asks SQLite, four times a second, whether another process has committed: then it reads everything
anew. So what the command line changes holds within a second, what the admin API changes at once.
"""

import hmac
import logging
import os
import queue
import secrets
import sqlite3
import threading
import time
from asyncio import wrap_future
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ktransformers.server.tenants.records import Key, Project, PublicPrefix, StoreError
from ktransformers.server.tenants.store import Store
from ktransformers.server.tenants.usage import DAY

LOOK_SECONDS = 0.25
SECRET_FILE = "secret"
SECRET_BYTES = 32
Result = TypeVar("Result")

log = logging.getLogger("ktransformers.server.tenants")


@dataclass(frozen=True)
class View:
    """One state of the store. A newer one replaces it as a whole."""

    projects: Mapping[str, Project] = field(default_factory=dict)
    keys: Mapping[bytes, Key] = field(default_factory=dict)
    """By SHA-256. Looking a key up in a table tells nothing about it by the time it takes: what is compared
    are digests, which nobody can choose."""
    prefixes: tuple[PublicPrefix, ...] = ()
    in_use: bool = False
    """There is, or was, a tenant: from then on nobody is served without a key."""

    def find(self, digest: bytes) -> Key | None:
        """The key with this SHA-256, unless it was revoked or has expired."""
        found = self.keys.get(digest)
        if found is None or (found.expires_at is not None and found.expires_at <= time.time()):
            return None
        return found

    @property
    def has_admin(self) -> bool:
        """Whether any key opens the admin API."""
        return any(not key.project for key in self.keys.values())


def narrowed(scope: bytes, salt: str) -> bytes:
    """The part of a tenant's scope that a client's `cache_salt` names: nothing outside the scope can be named
    by it."""
    return hmac.digest(scope, b"salt" + salt.encode(), "sha256") if salt else scope


class Directory:
    """Owns the store's thread; `close` it. Without a store it is empty and stays so."""

    def __init__(self, store: Store | None = None, secret: bytes | None = None) -> None:
        self.view = View()
        self._secret = secret or secrets.token_bytes(SECRET_BYTES)
        self._jobs: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if store is not None:
            seen = store.database.version()  # before the view: what comes between the two is looked at again
            self.view = _view(store)
            self._thread = threading.Thread(target=self._run, args=(store, seen), name="tenants", daemon=True)
            self._thread.start()

    @classmethod
    def open(cls, folder: Path) -> "Directory":
        """Of the store in `folder`. Errors: StoreError."""
        store = Store.open(folder)
        return cls(store, _secret(folder / SECRET_FILE))

    def close(self) -> None:
        """Do what was handed over, and close the store."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def cache_scope(self, tenant: str) -> bytes:
        """Prefix blocks are shared only inside it. Nobody who does not know this server's secret can name
        it."""
        return hmac.digest(self._secret, b"kv" + tenant.encode(), "sha256")

    def post(self, job: Callable[[Store], Result]) -> Future[Result]:
        """Have the store's thread do something. Errors (in the future): StoreError, sqlite3.Error."""
        future: Future[Result] = Future()
        if self._thread is None:
            future.set_exception(StoreError("this server has no tenant store"))
        else:
            self._jobs.put((job, future))
        return future

    async def call(self, job: Callable[[Store], Result]) -> Result:
        """The same for an act that changes what holds: once this returns, it holds."""

        def act(store: Store) -> Result:
            result = job(store)
            self.view = _view(store)
            return result

        return await wrap_future(self.post(act))

    async def read(self, job: Callable[[Store], Result]) -> Result:
        """The same for a question."""
        return await wrap_future(self.post(job))

    # ---- the store's thread

    def _run(self, store: Store, seen: int) -> None:
        next_look, next_day = time.monotonic() + LOOK_SECONDS, 0.0
        while True:
            if time.monotonic() >= next_look:
                seen = self._look(store, seen)
                if time.monotonic() >= next_day:
                    next_day = time.monotonic() + DAY
                    self._forget(store)
                next_look = time.monotonic() + LOOK_SECONDS
            try:
                job = self._jobs.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                continue
            if job is None:
                store.close()
                return
            _do(store, *job)

    def _look(self, store: Store, seen: int) -> int:
        try:
            version = store.database.version()
            if version != seen:
                self.view = _view(store)
            return version
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            log.error("the tenant store cannot be read, what was read last still holds: %s", error)
            return seen

    def _forget(self, store: Store) -> None:
        try:
            store.usage.forget_minutes(int(time.time()))
        except sqlite3.Error as error:
            log.error("old usage cannot be removed from the tenant store: %s", error)


def _do(store: Store, job: Callable[[Store], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever asked has left
    try:
        future.set_result(job(store))
    except Exception as error:  # handed on to whoever waits for the result
        future.set_exception(error)


def _view(store: Store) -> View:
    projects, _, keys, in_use = store.load()
    prefixes = tuple(store.public_prefixes())
    return View({p.id: p for p in projects}, {key.digest: key for key in keys}, prefixes, in_use)


def _secret(path: Path) -> bytes:
    """Made once. Were it lost, cached prefixes would not be found again, and nothing else."""
    try:
        if not path.exists():
            new = path.with_name(f"{SECRET_FILE}.{os.getpid()}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600), "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            secret = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if len(secret) != SECRET_BYTES:
        raise StoreError(f"{path}: not {SECRET_BYTES} bytes; remove it, and a new one is made")
    return secret
