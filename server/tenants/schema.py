"""The tables of the store, and how an older file becomes a newer one.

`PRAGMA user_version` counts the steps that a file has gone through. A step is never changed once released: a
change of the schema is one more step at the end.
"""

import sqlite3

from ktransformers.server.tenants.records import StoreError

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE projects (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, created_at INTEGER NOT NULL, archived_at INTEGER,
            weight REAL NOT NULL, priority TEXT NOT NULL, limits TEXT NOT NULL,
            models TEXT NOT NULL) STRICT""",
        "CREATE UNIQUE INDEX project_names ON projects (name) WHERE archived_at IS NULL",
        """CREATE TABLE accounts (
            id TEXT PRIMARY KEY, project TEXT NOT NULL REFERENCES projects (id), name TEXT NOT NULL,
            created_at INTEGER NOT NULL, deleted_at INTEGER) STRICT""",
        "CREATE UNIQUE INDEX account_names ON accounts (project, name) WHERE deleted_at IS NULL",
        # project and account are empty for the key of an administrator.
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY, project TEXT NOT NULL, account TEXT NOT NULL, name TEXT NOT NULL,
            digest BLOB NOT NULL UNIQUE, redacted TEXT NOT NULL, scopes TEXT NOT NULL, limits TEXT NOT NULL,
            created_at INTEGER NOT NULL, expires_at INTEGER, last_used_at INTEGER,
            revoked_at INTEGER) STRICT""",
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, actor TEXT NOT NULL,
            action TEXT NOT NULL, project TEXT NOT NULL, target TEXT NOT NULL,
            details TEXT NOT NULL) STRICT""",
        *(
            f"""CREATE TABLE {table} (
            start INTEGER NOT NULL, project TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
            requests INTEGER NOT NULL, input INTEGER NOT NULL, cached INTEGER NOT NULL,
            output INTEGER NOT NULL, PRIMARY KEY (start, project, key, model)) STRICT, WITHOUT ROWID"""
            for table in ("usage_minutes", "usage_days")
        ),
    ),
    (
        """CREATE TABLE public_prefixes (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL,
            body TEXT NOT NULL) STRICT""",
    ),
    tuple(
        f"ALTER TABLE {table} ADD COLUMN reasoning INTEGER NOT NULL DEFAULT 0"
        for table in ("usage_minutes", "usage_days")
    ),
)


def migrate(connection: sqlite3.Connection, steps: tuple[tuple[str, ...], ...] = STEPS) -> None:
    """Take the steps that are missing, all or none. Errors: StoreError for a file of a newer version."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(steps):
            raise StoreError(
                f"it was written by a newer version (schema {version}; this one knows {len(steps)}); run that"
            )
        for step in steps[version:]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(steps)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors, as a full disk, have ended it already
            connection.execute("ROLLBACK")
        raise
