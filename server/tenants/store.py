"""The store of tenants: one SQLite file (WAL) in a folder that nobody else can open.

The API process keeps one connection in a thread of its own; the command line may open another and write while
the server runs. Every act of an administrator and its line in the audit log are one transaction. A commit is
on the disk before it is answered (`synchronous=FULL`), so a key that was revoked stays revoked.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ktransformers.scheduler.protocol import PRIORITIES
from ktransformers.server.tenants.records import (
    ADMIN_KEY_PREFIX,
    KEY_PREFIX,
    NO_LIMITS,
    Account,
    AuditEntry,
    Conflict,
    Key,
    Limits,
    Missing,
    Priority,
    Project,
    PublicPrefix,
    StoreError,
    UsageRow,
    Used,
    check_name,
    check_scopes,
    check_weight,
    new_id,
    new_key,
)
from ktransformers.server.tenants.schema import migrate

FILE = "tenants.sqlite"
BUSY_SECONDS = 5.0
MINUTES_KEPT = 8 * 24 * 60
"""The usage API asks for minutes of a day and hours of a week; older usage is kept by day."""
DAY = 86400
MAX_PREFIX_BYTES = 1 << 20

_PROJECT = "id, name, created_at, archived_at, weight, priority, limits, models"
_KEY = (
    "id, project, account, name, digest, redacted, scopes, limits, created_at, expires_at, last_used_at"
)
_encode = msgspec.json.Encoder(order="sorted").encode
_limits = msgspec.json.Decoder(Limits)
_names = msgspec.json.Decoder(frozenset[str])


class Store:
    """One connection. Used by one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self.path = path

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store in `folder`, both made if they are not there. Errors: StoreError."""
        path = folder / FILE
        try:
            _make_private(folder, path)
            connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreError(f"tenant store {path}: {why}; XDG_DATA_HOME says where it lies") from None
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError("the file is damaged")
            migrate(connection)
            store = cls(connection, path)
            store.load()
        except (sqlite3.Error, msgspec.MsgspecError, StoreError) as error:
            connection.close()
            raise StoreError(
                f"tenant store {path}: {error}; put a copy back, or move the file away to begin anew"
            ) from None
        return store

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def version(self) -> int:
        """Changes whenever another connection has committed."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(version)

    @contextmanager
    def _act(
        self, actor: str, action: str, project: str, target: str, details: Mapping[str, object]
    ) -> Iterator[sqlite3.Connection]:
        """A transaction with its line in the audit log."""
        with self._transaction() as db:
            yield db
            db.execute(
                "INSERT INTO audit (at, actor, action, project, target, details) VALUES (?, ?, ?, ?, ?, ?)",
                (_now(), actor, action, project, target, _encode(details).decode()),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    # ---- what there is

    def load(self) -> tuple[list[Project], list[Account], list[Key], bool]:
        """Projects, accounts and keys that were not archived, deleted or revoked (but may have expired), and
        whether there ever was a project."""
        with self._reading():
            projects = [_project(row) for row in self._db.execute(f"SELECT {_PROJECT} FROM projects")]
            accounts = self._db.execute(
                "SELECT a.id, a.project, a.name, a.created_at FROM accounts a JOIN projects p "
                "ON p.id = a.project WHERE a.deleted_at IS NULL AND p.archived_at IS NULL ORDER BY a.rowid"
            ).fetchall()
            keys = self._db.execute(f"SELECT {_KEY} FROM keys WHERE revoked_at IS NULL ORDER BY rowid")
            active = [project for project in projects if project.archived_at is None]
            ids = {project.id for project in active} | {""}
            return (
                active,
                [Account(*row) for row in accounts],
                [key for key in map(_key, keys) if key.project in ids],
                bool(projects),
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One state of the file for several queries."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def projects(self, archived: bool = False) -> list[Project]:
        """By age."""
        where = "" if archived else "WHERE archived_at IS NULL"
        rows = self._db.execute(f"SELECT {_PROJECT} FROM projects {where} ORDER BY rowid")
        return [_project(row) for row in rows]

    def project(self, name_or_id: str) -> Project:
        """Of an active project the name, of any the id. Errors: Missing."""
        row = self._db.execute(
            f"SELECT {_PROJECT} FROM projects WHERE id = ? OR (name = ? AND archived_at IS NULL)",
            (name_or_id, name_or_id),
        ).fetchone()
        if row is None:
            raise Missing(f"there is no tenant {name_or_id[:80]!r}")
        return _project(row)

    def project_by_id(self, id: str) -> Project:  # noqa: A002
        """Also an archived one. Errors: Missing."""
        project = self.project(id)
        if project.id != id:
            raise Missing(f"there is no project {id[:80]!r}")
        return project

    # ---- projects

    def create_project(
        self,
        name: str,
        actor: str,
        *,
        weight: float = 1.0,
        priority: Priority = "normal",
        limits: Limits = NO_LIMITS,
        models: Iterable[str] = (),
    ) -> Project:
        """Errors: StoreError, Conflict."""
        _check_priority(priority)
        project = Project(
            new_id("proj"), check_name(name), _now(), None, check_weight(weight), priority, limits,
            frozenset(models),
        )  # fmt: skip
        details = {"name": name, "weight": weight, "priority": priority, "limits": limits}
        try:
            with self._act(actor, "project.created", project.id, project.id, details) as db:
                row = _row(project)
                db.execute(f"INSERT INTO projects ({_PROJECT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a tenant {name!r} already") from None
        return project

    def change_project(self, id: str, actor: str, action: str = "project.updated", **changes: Any) -> Project:  # noqa: A002
        """Change name, weight, priority, limits or models. Errors: StoreError, Missing, Conflict."""
        before = self._active(id)
        project = msgspec.structs.replace(before, **changes)
        check_name(project.name)
        check_weight(project.weight)
        _check_priority(project.priority)
        details = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in changes.items()}
        try:
            with self._act(actor, action, project.id, project.id, details) as db:
                db.execute(
                    "UPDATE projects SET name = ?, weight = ?, priority = ?, limits = ?, models = ? "
                    "WHERE id = ?",
                    (project.name, *_row(project)[4:], project.id),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a tenant {project.name!r} already") from None
        return project

    def archive_project(self, id: str, actor: str) -> Project:  # noqa: A002
        """Its keys work no longer; what it used stays in the ledger. Errors: Missing."""
        project = msgspec.structs.replace(self._active(id), archived_at=_now())
        with self._act(actor, "project.archived", id, id, {"name": project.name}) as db:
            db.execute("UPDATE projects SET archived_at = ? WHERE id = ?", (project.archived_at, id))
            db.execute("UPDATE keys SET revoked_at = ? WHERE project = ?", (project.archived_at, id))
        return project

    def change_limits(self, id: str, actor: str, changes: Mapping[str, int | None]) -> Project:  # noqa: A002
        """Set or (None) lift limits of a project, by the names of Limits. Errors: StoreError, Missing."""
        limits = msgspec.structs.replace(self._active(id).limits, **changes)
        return self.change_project(id, actor, "rate_limit.updated", limits=limits)

    def _active(self, id: str) -> Project:  # noqa: A002
        project = self.project_by_id(id)
        if project.archived_at is not None:
            raise Missing(f"there is no active tenant {id[:80]!r}")
        return project

    # ---- public prefixes

    def public_prefixes(self) -> list[PublicPrefix]:
        """By age."""
        rows = self._db.execute("SELECT id, name, created_at, body FROM public_prefixes ORDER BY rowid")
        return [PublicPrefix(*row) for row in rows]

    def publish(self, name: str, body: Mapping[str, object], actor: str) -> PublicPrefix:
        """Let every tenant find the KV of this beginning of prompts. Errors: StoreError, Conflict."""
        check_name(name)
        made = PublicPrefix(new_id("prefix"), name, _now(), _encode(body).decode())
        if len(made.body) > MAX_PREFIX_BYTES:
            raise StoreError(f"a public prefix has at most {MAX_PREFIX_BYTES:,} bytes")
        if any(other.name == name for other in self.public_prefixes()):
            raise Conflict(f"there is a public prefix {name!r}")
        with self._act(actor, "public_prefix.created", "", made.id, {"name": name}) as db:
            db.execute("INSERT INTO public_prefixes VALUES (?, ?, ?, ?)", msgspec.structs.astuple(made))
        return made

    def withdraw(self, id: str, actor: str) -> PublicPrefix:  # noqa: A002
        """It is not public any more; by its id or name. Errors: Missing."""
        found = next((p for p in self.public_prefixes() if id in (p.id, p.name)), None)
        if found is None:
            raise Missing(f"there is no public prefix {id[:80]!r}")
        with self._act(actor, "public_prefix.deleted", "", found.id, {"name": found.name}) as db:
            db.execute("DELETE FROM public_prefixes WHERE id = ?", (found.id,))
        return found

    # ---- accounts

    def accounts(self, project: str) -> list[Account]:
        """By age."""
        rows = self._db.execute(
            "SELECT id, project, name, created_at FROM accounts WHERE project = ? AND deleted_at IS NULL "
            "ORDER BY rowid",
            (project,),
        )
        return [Account(*row) for row in rows]

    def account(self, project: str, id: str) -> Account:  # noqa: A002
        """Errors: Missing."""
        for account in self.accounts(project):
            if account.id == id:
                return account
        raise Missing("there is no such account in this tenant")

    def create_account(self, project: str, name: str, actor: str) -> Account:
        """Errors: StoreError, Missing, Conflict."""
        account = Account(new_id("svc"), self._active(project).id, check_name(name), _now())
        try:
            with self._act(actor, "service_account.created", project, account.id, {"name": name}) as db:
                db.execute(
                    "INSERT INTO accounts (id, project, name, created_at) VALUES (?, ?, ?, ?)",
                    (account.id, project, name, account.created_at),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is an account {name!r} in this tenant already") from None
        return account

    def rename_account(self, project: str, id: str, name: str, actor: str) -> Account:  # noqa: A002
        """Errors: StoreError, Missing, Conflict."""
        account = msgspec.structs.replace(self.account(project, id), name=check_name(name))
        try:
            with self._act(actor, "service_account.updated", project, id, {"name": name}) as db:
                db.execute("UPDATE accounts SET name = ? WHERE id = ?", (name, id))
        except sqlite3.IntegrityError:
            raise Conflict(f"there is an account {name!r} in this tenant already") from None
        return account

    def delete_account(self, project: str, id: str, actor: str) -> None:  # noqa: A002
        """Its keys go with it. Errors: Missing."""
        self.account(project, id)
        with self._act(actor, "service_account.deleted", project, id, {}) as db:
            db.execute("UPDATE accounts SET deleted_at = ? WHERE id = ?", (_now(), id))
            db.execute(
                "UPDATE keys SET revoked_at = ? WHERE account = ? AND revoked_at IS NULL", (_now(), id)
            )

    # ---- keys

    def keys(self, project: str) -> list[Key]:
        """Those of a project ("": of the administrators) that were not revoked, by age."""
        rows = self._db.execute(
            f"SELECT {_KEY} FROM keys WHERE project = ? AND revoked_at IS NULL ORDER BY rowid", (project,)
        )
        return [_key(row) for row in rows]

    def key(self, project: str, id: str) -> Key:  # noqa: A002
        """Errors: Missing."""
        for key in self.keys(project):
            if key.id == id:
                return key
        raise Missing("there is no such key")

    def find_key(self, id: str) -> Key:  # noqa: A002
        """Of any project. Errors: Missing."""
        row = self._db.execute(
            f"SELECT {_KEY} FROM keys WHERE id = ? AND revoked_at IS NULL", (id,)
        ).fetchone()
        if row is None:
            raise Missing(f"there is no key {id[:80]!r}")
        return _key(row)

    def create_key(
        self,
        account: Account | None,
        name: str,
        actor: str,
        *,
        expires_at: int | None = None,
        scopes: Iterable[str] = (),
        limits: Limits = NO_LIMITS,
    ) -> tuple[Key, str]:
        """A new key of an account (None: of an administrator) and its value, which is not kept.

        Errors: StoreError.
        """
        value, digest, redacted = new_key(KEY_PREFIX if account else ADMIN_KEY_PREFIX)
        if expires_at is not None and expires_at <= _now():
            raise StoreError("a key must not have expired when it is made")
        project = account.project if account else ""
        key = Key(
            new_id("key"), project, account.id if account else "", check_name(name), digest, redacted,
            check_scopes(frozenset(scopes)), limits, _now(), expires_at, None,
        )  # fmt: skip
        details = {"name": name, "scopes": sorted(key.scopes), "expires_at": expires_at, "limits": limits}
        action = "api_key.created" if account else "tenant.admin_api_key.created"
        with self._act(actor, action, project, key.id, details) as db:
            db.execute(f"INSERT INTO keys ({_KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _key_row(key))
        return key, value

    def change_key(self, key: Key, actor: str, **changes: Any) -> Key:
        """Change scopes, expires_at or limits. Errors: StoreError."""
        changed = msgspec.structs.replace(key, **changes)
        check_scopes(changed.scopes)
        details = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in changes.items()}
        with self._act(actor, "api_key.updated", key.project, key.id, details) as db:
            db.execute(
                "UPDATE keys SET scopes = ?, limits = ?, expires_at = ? WHERE id = ?",
                (
                    _encode(changed.scopes).decode(),
                    _encode(changed.limits).decode(),
                    changed.expires_at,
                    key.id,
                ),
            )
        return changed

    def revoke_key(self, key: Key, actor: str) -> None:
        """It works no longer."""
        action = "api_key.deleted" if key.project else "tenant.admin_api_key.deleted"
        with self._act(actor, action, key.project, key.id, {"name": key.name}) as db:
            db.execute("UPDATE keys SET revoked_at = ? WHERE id = ?", (_now(), key.id))

    # ---- the audit log

    def audit(
        self, before: int | None = None, limit: int = 100, actions: frozenset[str] = frozenset()
    ) -> list[AuditEntry]:
        """The latest first; `before` is the id of an entry, no `actions` are all."""
        rows = self._db.execute(
            "SELECT id, at, actor, action, project, target, details FROM audit WHERE (?1 IS NULL OR id < ?1) "
            "AND (?2 = '[]' OR action IN (SELECT value FROM json_each(?2))) ORDER BY id DESC LIMIT ?3",
            (before, _encode(actions).decode(), limit),
        )
        return [_entry(*row) for row in rows]

    # ---- usage

    def add_usage(self, at: int, rows: Sequence[UsageRow], used: Mapping[str, int]) -> None:
        """Add what was used since the last time (`start` of the rows is not looked at), and when keys were
        last used."""
        with self._transaction() as db:
            for table, width in (("usage_minutes", 60), ("usage_days", DAY)):
                db.executemany(
                    f"INSERT INTO {table} (start, project, key, model, requests, input, cached, output) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "requests = requests + excluded.requests, input = input + excluded.input, "
                    "cached = cached + excluded.cached, output = output + excluded.output",
                    [
                        (at - at % width, r.project, r.key, r.model, r.requests, r.input, r.cached, r.output)
                        for r in rows
                    ],
                )
            db.executemany(
                "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
                [(when, key) for key, when in used.items()],
            )

    def forget_minutes(self, now: int) -> None:
        """Drop usage by the minute that is older than what is ever asked for."""
        with self._transaction() as db:
            db.execute("DELETE FROM usage_minutes WHERE start < ?", (now - MINUTES_KEPT * 60,))

    def usage(self, begin: int, end: int, by_day: bool) -> list[UsageRow]:
        """All rows that start in begin ≤ start < end."""
        table = "usage_days" if by_day else "usage_minutes"
        rows = self._db.execute(
            f"SELECT start, project, key, model, requests, input, cached, output FROM {table} "
            "WHERE start >= ? AND start < ? ORDER BY start, project, key, model",
            (begin, end),
        )
        return [UsageRow(*row) for row in rows]

    def used_on(self, day: int) -> dict[str, Used]:
        """By project id and by key id, on the day that contains the time `day`."""
        found: dict[str, Used] = {}
        for row in self.usage(day - day % DAY, day - day % DAY + DAY, by_day=True):
            for subject in (row.project, row.key):
                before = found.get(subject, Used())
                tokens = before.tokens + row.input + row.output
                found[subject] = Used(before.requests + row.requests, tokens)
        return found


def _make_private(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    # Root acts for the owner: SQLite gives the files that it makes to the owner of the first one.
    if os.geteuid() not in (0, owner):
        raise StoreError(f"tenant store {folder}: belongs to another user")
    folder.chmod(0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    path.chmod(0o600)


def _now() -> int:
    return int(time.time())


def _check_priority(priority: str) -> None:
    if priority not in PRIORITIES:
        raise StoreError(f"a priority is one of {', '.join(PRIORITIES)}")


def _row(p: Project) -> tuple[object, ...]:
    limits, models = _encode(p.limits).decode(), _encode(p.models).decode()
    return p.id, p.name, p.created_at, p.archived_at, p.weight, p.priority, limits, models


def _project(row: tuple[Any, ...]) -> Project:
    id_, name, created_at, archived_at, weight, priority, limits, models = row
    return Project(
        id_, name, created_at, archived_at, weight, priority, _limits.decode(limits), _names.decode(models)
    )


def _key_row(k: Key) -> tuple[object, ...]:
    scopes, limits = _encode(k.scopes).decode(), _encode(k.limits).decode()
    return (
        k.id, k.project, k.account, k.name, k.digest, k.redacted, scopes, limits, k.created_at, k.expires_at,
        k.last_used_at,
    )  # fmt: skip


def _key(row: tuple[Any, ...]) -> Key:
    id_, project, account, name, digest, redacted, scopes, limits, *times = row
    return Key(
        id_, project, account, name, digest, redacted, _names.decode(scopes), _limits.decode(limits), *times
    )


def _entry(
    id_: int, at: int, actor: str, action: str, project: str, target: str, details: str
) -> AuditEntry:
    return AuditEntry(id_, at, actor, action, project, target, msgspec.json.decode(details))
