"""The store of tenants: projects, their accounts and keys, public prefixes, and the audit log of what was
done to them. (The file is database.py's; what they used is in usage.py.)"""

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ktransformers.scheduler.protocol import PRIORITIES
from ktransformers.server.tenants.database import Database
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
    check_limits,
    check_name,
    check_scopes,
    check_weight,
    new_id,
    new_key,
)
from ktransformers.server.tenants.rows import (
    KEY,
    PROJECT,
    encode,
    key_row,
    now,
    project_row,
    to_entry,
    to_key,
    to_project,
)
from ktransformers.server.tenants.usage import UsageTables

MAX_PREFIX_BYTES = 1 << 20


class Store:
    """All that is kept of tenants, on one connection. Used by one thread at a time."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.usage = UsageTables(database)
        self._db = database.connection

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store in `folder`, both made if they are not there. Errors: StoreError."""
        store = cls(Database.open(folder))
        with store.database.damage():
            store.load()
        return store

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    # ---- what there is

    def load(self) -> tuple[list[Project], list[Account], list[Key], bool]:
        """Projects, accounts and keys that were not archived, deleted or revoked (but may have expired), and
        whether there ever was a project."""
        with self.database.reading():
            projects = [to_project(row) for row in self._db.execute(f"SELECT {PROJECT} FROM projects")]
            accounts = self._db.execute(
                "SELECT a.id, a.project, a.name, a.created_at FROM accounts a JOIN projects p "
                "ON p.id = a.project WHERE a.deleted_at IS NULL AND p.archived_at IS NULL ORDER BY a.rowid"
            ).fetchall()
            keys = self._db.execute(f"SELECT {KEY} FROM keys WHERE revoked_at IS NULL ORDER BY rowid")
            active = [project for project in projects if project.archived_at is None]
            ids = {project.id for project in active} | {""}
            return (
                active,
                [Account(*row) for row in accounts],
                [key for key in map(to_key, keys) if key.project in ids],
                bool(projects),
            )

    def projects(self, archived: bool = False) -> list[Project]:
        """By age."""
        where = "" if archived else "WHERE archived_at IS NULL"
        rows = self._db.execute(f"SELECT {PROJECT} FROM projects {where} ORDER BY rowid")
        return [to_project(row) for row in rows]

    def project(self, name_or_id: str) -> Project:
        """Of an active project the name, of any the id. Errors: Missing."""
        row = self._db.execute(
            f"SELECT {PROJECT} FROM projects WHERE id = ? OR (name = ? AND archived_at IS NULL)",
            (name_or_id, name_or_id),
        ).fetchone()
        if row is None:
            raise Missing(f"there is no tenant {name_or_id[:80]!r}: `ktransformers tenants list` shows them")
        return to_project(row)

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
            new_id("proj"), check_name(name), now(), None, check_weight(weight), priority,
            check_limits(limits), frozenset(models),
        )  # fmt: skip
        details = {"name": name, "weight": weight, "priority": priority, "limits": limits}
        try:
            with self.database.act(actor, "project.created", project.id, project.id, details) as db:
                row = project_row(project)
                db.execute(f"INSERT INTO projects ({PROJECT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a tenant {name!r} already") from None
        return project

    def change_project(self, id: str, actor: str, action: str = "project.updated", **changes: Any) -> Project:  # noqa: A002
        """Change name, weight, priority, limits or models. Errors: StoreError, Missing, Conflict."""
        before = self._active(id)
        project = msgspec.structs.replace(before, **changes)
        check_name(project.name)
        check_weight(project.weight)
        check_limits(project.limits)
        _check_priority(project.priority)
        details = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in changes.items()}
        try:
            with self.database.act(actor, action, project.id, project.id, details) as db:
                db.execute(
                    "UPDATE projects SET name = ?, weight = ?, priority = ?, limits = ?, models = ? "
                    "WHERE id = ?",
                    (project.name, *project_row(project)[4:], project.id),
                )
        except sqlite3.IntegrityError:
            raise Conflict(f"there is a tenant {project.name!r} already") from None
        return project

    def archive_project(self, id: str, actor: str) -> Project:  # noqa: A002
        """Its keys work no longer; what it used stays in the ledger. Errors: Missing."""
        project = msgspec.structs.replace(self._active(id), archived_at=now())
        with self.database.act(actor, "project.archived", id, id, {"name": project.name}) as db:
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
        made = PublicPrefix(new_id("prefix"), name, now(), encode(body))
        if len(made.body) > MAX_PREFIX_BYTES:
            raise StoreError(f"a public prefix has at most {MAX_PREFIX_BYTES:,} bytes")
        if any(other.name == name for other in self.public_prefixes()):
            raise Conflict(f"there is a public prefix {name!r}")
        with self.database.act(actor, "public_prefix.created", "", made.id, {"name": name}) as db:
            db.execute("INSERT INTO public_prefixes VALUES (?, ?, ?, ?)", msgspec.structs.astuple(made))
        return made

    def withdraw(self, id: str, actor: str) -> PublicPrefix:  # noqa: A002
        """It is not public any more; by its id or name. Errors: Missing."""
        found = next((p for p in self.public_prefixes() if id in (p.id, p.name)), None)
        if found is None:
            raise Missing(f"there is no public prefix {id[:80]!r}")
        with self.database.act(actor, "public_prefix.deleted", "", found.id, {"name": found.name}) as db:
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
        account = Account(new_id("svc"), self._active(project).id, check_name(name), now())
        try:
            details = {"name": name}
            with self.database.act(actor, "service_account.created", project, account.id, details) as db:
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
            with self.database.act(actor, "service_account.updated", project, id, {"name": name}) as db:
                db.execute("UPDATE accounts SET name = ? WHERE id = ?", (name, id))
        except sqlite3.IntegrityError:
            raise Conflict(f"there is an account {name!r} in this tenant already") from None
        return account

    def delete_account(self, project: str, id: str, actor: str) -> None:  # noqa: A002
        """Its keys go with it. Errors: Missing."""
        self.account(project, id)
        with self.database.act(actor, "service_account.deleted", project, id, {}) as db:
            db.execute("UPDATE accounts SET deleted_at = ? WHERE id = ?", (now(), id))
            db.execute(
                "UPDATE keys SET revoked_at = ? WHERE account = ? AND revoked_at IS NULL", (now(), id)
            )

    # ---- keys

    def keys(self, project: str) -> list[Key]:
        """Those of a project ("": of the administrators) that were not revoked, by age."""
        rows = self._db.execute(
            f"SELECT {KEY} FROM keys WHERE project = ? AND revoked_at IS NULL ORDER BY rowid", (project,)
        )
        return [to_key(row) for row in rows]

    def key(self, project: str, id: str) -> Key:  # noqa: A002
        """Errors: Missing."""
        for key in self.keys(project):
            if key.id == id:
                return key
        raise Missing("there is no such key")

    def find_key(self, id: str) -> Key:  # noqa: A002
        """Of any project. Errors: Missing."""
        row = self._db.execute(
            f"SELECT {KEY} FROM keys WHERE id = ? AND revoked_at IS NULL", (id,)
        ).fetchone()
        if row is None:
            raise Missing(f"there is no key {id[:80]!r}")
        return to_key(row)

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
        if expires_at is not None and expires_at <= now():
            raise StoreError("a key must not have expired when it is made")
        project = account.project if account else ""
        key = Key(
            new_id("key"), project, account.id if account else "", check_name(name), digest, redacted,
            check_scopes(frozenset(scopes)), check_limits(limits), now(), expires_at, None,
        )  # fmt: skip
        details = {"name": name, "scopes": sorted(key.scopes), "expires_at": expires_at, "limits": limits}
        action = "api_key.created" if account else "tenant.admin_api_key.created"
        with self.database.act(actor, action, project, key.id, details) as db:
            db.execute(f"INSERT INTO keys ({KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", key_row(key))
        return key, value

    def change_key(self, key: Key, actor: str, **changes: Any) -> Key:
        """Change scopes, expires_at or limits. Errors: StoreError."""
        changed = msgspec.structs.replace(key, **changes)
        check_scopes(changed.scopes)
        check_limits(changed.limits)
        details = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in changes.items()}
        with self.database.act(actor, "api_key.updated", key.project, key.id, details) as db:
            db.execute(
                "UPDATE keys SET scopes = ?, limits = ?, expires_at = ? WHERE id = ?",
                (
                    encode(changed.scopes),
                    encode(changed.limits),
                    changed.expires_at,
                    key.id,
                ),
            )
        return changed

    def rotate_key(
        self, key: Key, actor: str, until: int | None = None, expires_at: int | None = None
    ) -> tuple[Key, str]:
        """A new key in the place of this one, with its account, name, scopes and limits, and its value.

        The old one works until then (None: no longer). Without `expires_at` the new one lives as long as the
        old one was to live from its making. Errors: StoreError, Missing.
        """
        account = self.account(key.project, key.account) if key.project else None
        if expires_at is None and key.expires_at is not None:
            expires_at = now() + key.expires_at - key.created_at
        made = self.create_key(
            account, key.name, actor, expires_at=expires_at, scopes=key.scopes, limits=key.limits
        )
        if until is None:
            self.revoke_key(key, actor)
        elif key.expires_at is None or until < key.expires_at:
            self.change_key(key, actor, expires_at=until)
        return made

    def revoke_key(self, key: Key, actor: str) -> None:
        """It works no longer."""
        action = "api_key.deleted" if key.project else "tenant.admin_api_key.deleted"
        with self.database.act(actor, action, key.project, key.id, {"name": key.name}) as db:
            db.execute("UPDATE keys SET revoked_at = ? WHERE id = ?", (now(), key.id))

    # ---- the audit log

    def audit(
        self, before: int | None = None, limit: int = 100, actions: frozenset[str] = frozenset()
    ) -> list[AuditEntry]:
        """The latest first; `before` is the id of an entry, no `actions` are all."""
        rows = self._db.execute(
            "SELECT id, at, actor, action, project, target, details FROM audit WHERE (?1 IS NULL OR id < ?1) "
            "AND (?2 = '[]' OR action IN (SELECT value FROM json_each(?2))) ORDER BY id DESC LIMIT ?3",
            (before, encode(actions), limit),
        )
        return [to_entry(*row) for row in rows]


def _check_priority(priority: str) -> None:
    if priority not in PRIORITIES:
        raise StoreError(f"a priority is one of {', '.join(PRIORITIES)}")
