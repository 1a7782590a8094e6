"""Records as rows of the database's tables, and back."""

import time
from typing import Any

import msgspec

from ktransformers.server.tenants.records import AuditEntry, Key, Limits, Project

PROJECT = "id, name, created_at, archived_at, weight, priority, limits, models"
"""Columns in the order of `project_row`."""
KEY = (
    "id, project, account, name, digest, redacted, scopes, limits, created_at, expires_at, last_used_at"
)
"""Columns in the order of `key_row`."""
_encoder = msgspec.json.Encoder(order="sorted")
_limits = msgspec.json.Decoder(Limits)
_names = msgspec.json.Decoder(frozenset[str])


def encode(value: object) -> str:
    """As JSON, equal values to equal texts."""
    return _encoder.encode(value).decode()


def now() -> int:
    """Seconds, as all times of the database."""
    return int(time.time())


def project_row(p: Project) -> tuple[object, ...]:
    """For the columns PROJECT."""
    limits, models = encode(p.limits), encode(p.models)
    return p.id, p.name, p.created_at, p.archived_at, p.weight, p.priority, limits, models


def to_project(row: tuple[Any, ...]) -> Project:
    """Of the columns PROJECT."""
    id_, name, created_at, archived_at, weight, priority, limits, models = row
    return Project(
        id_, name, created_at, archived_at, weight, priority, _limits.decode(limits), _names.decode(models)
    )


def key_row(k: Key) -> tuple[object, ...]:
    """For the columns KEY."""
    scopes, limits = encode(k.scopes), encode(k.limits)
    return (
        k.id, k.project, k.account, k.name, k.digest, k.redacted, scopes, limits, k.created_at, k.expires_at,
        k.last_used_at,
    )  # fmt: skip


def to_key(row: tuple[Any, ...]) -> Key:
    """Of the columns KEY."""
    id_, project, account, name, digest, redacted, scopes, limits, *times = row
    return Key(
        id_, project, account, name, digest, redacted, _names.decode(scopes), _limits.decode(limits), *times
    )


def to_entry(
    id_: int, at: int, actor: str, action: str, project: str, target: str, details: str
) -> AuditEntry:
    """Of the columns of the table audit."""
    return AuditEntry(id_, at, actor, action, project, target, msgspec.json.decode(details))
