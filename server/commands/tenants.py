"""`ktransformers tenants`: writes to the store, which a running server follows."""

import json
import os
import pwd
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import structs

from ktransformers.server.config import tenants_dir
from ktransformers.server.tenants.database import explain
from ktransformers.server.tenants.records import Key, Limits, Project, StoreError, Used, check_scopes
from ktransformers.server.tenants.store import Store

_LIMITS = Limits.__struct_fields__
_UNITS = {"m": 60, "h": 3600, "d": 86400}


@contextmanager
def _store() -> Iterator[tuple[Store, str]]:
    """The store, and who acts. Errors: StoreError."""
    store = Store.open(tenants_dir())
    try:
        yield store, f"cli:{_user()}"
    except sqlite3.Error as error:
        raise StoreError(explain(store.database.path, error)) from None
    finally:
        store.close()


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, say
        return str(os.getuid())


def _changed(given: Mapping[str, Any]) -> dict[str, int | None]:
    """The limits that the command line names; 0 lifts one."""
    return {name: given[name] or None for name in _LIMITS if given.get(name) is not None}


def _models(text: str | None) -> frozenset[str] | None:
    if text is None:
        return None
    named = frozenset(part.strip() for part in text.split(",") if part.strip())
    return frozenset() if named == {"all"} else named


def create(name: str, given: Mapping[str, Any]) -> None:
    """Make a tenant."""
    with _store() as (store, actor):
        limits = Limits(**_changed(given))
        more = {n: given[n] for n in ("weight", "priority") if given[n] is not None}
        models = _models(given["models"]) or ()
        project = store.create_project(name, actor, limits=limits, models=models, **more)
    print(f"{project.name}  {project.id}")
    print(f"Its first key: ktransformers tenants key {project.id}", file=sys.stderr)


def change(name: str, given: Mapping[str, Any]) -> None:
    """Change what is given, in one act."""
    with _store() as (store, actor):
        project = store.project(name)
        changes = {n: given[n] for n in ("weight", "priority") if given[n] is not None}
        if given["rename"] is not None:
            changes["name"] = given["rename"]
        if (models := _models(given["models"])) is not None:
            changes["models"] = models
        if changes:
            store.change_project(project.id, actor, **changes)
        if limits := _changed(given):
            store.change_limits(project.id, actor, limits)
        if not changes and not limits:
            raise StoreError("nothing to change was named; --help lists what there is")
        _print_project(store, store.project(project.id))


def show_all() -> None:
    """A line for each tenant."""
    with _store() as (store, _):
        used = store.usage.on_day(int(time.time()))
        rows = [("NAME", "ID", "WEIGHT", "PRIORITY", "KEYS", "TOKENS TODAY", "LIMITS")]
        rows += [
            (
                p.name, p.id, f"{p.weight:g}", p.priority, str(len(store.keys(p.id))),
                f"{used.get(p.id, Used()).tokens:,}", _limits(p.limits),
            )
            for p in store.projects()
        ]  # fmt: skip
        admins = len(store.keys(""))
    _table(rows)
    if len(rows) == 1:
        print("no tenants: `ktransformers tenants create NAME` makes one", file=sys.stderr)
    print(f"keys of administrators: {admins}", file=sys.stderr)


def show(name: str) -> None:
    """One tenant."""
    with _store() as (store, _):
        _print_project(store, store.project(name))


def delete(name: str) -> None:
    """Archive it."""
    with _store() as (store, actor):
        project = store.archive_project(store.project(name).id, actor)
    print(f"{project.name}  {project.id}  archived; its keys work no longer")


def key(
    tenant: str, name: str, expires: str | None, scopes: Sequence[str], limits: Mapping[str, int | None]
) -> None:
    """Make a key of the account with that name, which is made too if it is not there."""
    with _store() as (store, actor):
        project = store.project(tenant)
        account = next((a for a in store.accounts(project.id) if a.name == name), None)
        # What may be refused comes first, so that no account is left behind without a key.
        until, narrowed = _time(expires), check_scopes(frozenset(scopes))
        account = account or store.create_account(project.id, name, actor)
        made, value = store.create_key(
            account, name, actor, expires_at=until, scopes=narrowed, limits=Limits(**_changed(limits))
        )
    _print_key(made, value)


def change_key(
    id: str,  # noqa: A002
    expires: str | None,
    scopes: Sequence[str] | None,
    limits: Mapping[str, int | None],
) -> None:
    """Change what is given, in one act."""
    with _store() as (store, actor):
        found = store.find_key(id)
        changes: dict[str, Any] = {}
        if expires is not None:
            changes["expires_at"] = None if expires == "never" else _time(expires)
        if scopes is not None:
            changes["scopes"] = frozenset() if list(scopes) == ["all"] else frozenset(scopes)
        if given := _changed(limits):
            changes["limits"] = structs.replace(found.limits, **given)
        if not changes:
            raise StoreError("nothing to change was named; --help lists what there is")
        changed = store.change_key(found, actor, **changes)
        _print_keys(store, [changed])


def rotate(id: str, grace: str | None, expires: str | None) -> None:  # noqa: A002
    """Make a key in the place of another one."""
    with _store() as (store, actor):
        made, value = store.rotate_key(
            store.find_key(id), actor, _time(grace, "--grace"), _time(expires)
        )
    _print_key(made, value)


def revoke(id: str) -> None:  # noqa: A002
    """Make a key work no longer."""
    with _store() as (store, actor):
        found = store.find_key(id)
        store.revoke_key(found, actor)
    print(f"{found.id}  {found.redacted}  revoked")


def admin_key(name: str, expires: str | None) -> None:
    """Make a key of an administrator."""
    with _store() as (store, actor):
        made, value = store.create_key(None, name, actor, expires_at=_time(expires))
    _print_key(made, value)


def publish(name: str, file: str, messages: bool) -> None:
    """Make a prefix public."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        body = {"messages": json.loads(text)} if messages else {"text": text}
        if messages:
            _check_messages(body["messages"])
        elif not text:
            raise ValueError("is empty")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{file}: {why}") from None
    with _store() as (store, actor):
        made = store.publish(name, body, actor)
    print(f"{made.name}  {made.id}")


def _check_messages(messages: object) -> None:
    """Whether a conversation may begin so. Errors: ValueError."""
    from ktransformers.server.text.messages import template_messages

    if not isinstance(messages, list):
        raise ValueError("is not a list of messages")
    template_messages(messages)


def published() -> None:
    """A line for each public prefix."""
    with _store() as (store, _):
        prefixes = store.public_prefixes()
    rows = [("NAME", "ID", "SINCE", "BYTES")]
    rows += [(p.name, p.id, _when(p.created_at), f"{len(p.body):,}") for p in prefixes]
    _table(rows)


def withdraw(name: str) -> None:
    """Make one public no longer."""
    with _store() as (store, actor):
        gone = store.withdraw(name, actor)
    print(f"{gone.name}  {gone.id}  withdrawn")


def audit(limit: int) -> None:
    """A line for each act."""
    with _store() as (store, _):
        entries = store.audit(limit=limit)
    _table(
        [("TIME", "ACTOR", "ACT", "PROJECT", "TARGET", "DETAILS")]
        + [(_when(e.at), e.actor, e.action, e.project or "-", e.target, str(e.details)) for e in entries]
    )


def _print_key(made: Key, value: str) -> None:
    """The key alone on stdout, so that a script can take it."""
    print(value, flush=True)
    until = "never" if made.expires_at is None else _when(made.expires_at)
    print(f"{made.id}, expires: {until}. It is not shown again.", file=sys.stderr)


def _print_project(store: Store, p: Project) -> None:
    used = store.usage.on_day(int(time.time()))
    print(f"{p.name}  {p.id}  {'active' if p.archived_at is None else 'archived'}")
    print(f"weight {p.weight:g}, priority {p.priority}: a share of {p.share:g}")
    print(f"limits: {_limits(p.limits)}")
    print(f"models: {', '.join(sorted(p.models)) or 'all'}")
    today = used.get(p.id, Used())
    print(f"today (UTC): {today.requests:,} requests, {today.tokens:,} tokens")
    _print_keys(store, store.keys(p.id))


def _print_keys(store: Store, keys: Sequence[Key]) -> None:
    used = store.usage.on_day(int(time.time()))
    rows = [("KEY", "NAME", "SHOWN AS", "SCOPES", "EXPIRES", "LAST USED", "TOKENS TODAY", "LIMITS")]
    rows += [
        (
            k.id, k.name, k.redacted, ",".join(sorted(k.scopes)) or "all", _when(k.expires_at, "never"),
            _when(k.last_used_at, "never"), f"{used.get(k.id, Used()).tokens:,}", _limits(k.limits),
        )
        for k in keys
    ]  # fmt: skip
    _table(rows)


def _limits(limits: Limits) -> str:
    named = [(name, getattr(limits, name)) for name in _LIMITS]
    return ", ".join(f"{n.replace('_', ' ')} {v:,}" for n, v in named if v is not None) or "none"


def _when(at: int | None, otherwise: str = "") -> str:
    return otherwise if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _time(text: str | None, option: str = "--expires") -> int | None:
    """A point in time from what the option takes. Errors: StoreError."""
    if text is None:
        return None
    if match := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
        return int(time.time()) + int(match[1]) * _UNITS[match[2]]
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise StoreError(f"{option} {text[:40]!r}: say 90d, 12h, 30m, or a date as 2027-01-31") from None


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
