"""Who may call what: API keys, and the role that every route declares.

Keys come from the settings, where a key's name is its tenant and the name `admin` is the operator, and from
the tenant store. Without any key and any tenant the server listens on loopback only, and whoever is on the
machine is the operator.
"""

import dataclasses
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers

from ktransformers.scheduler.protocol import PRIORITIES, Tenant
from ktransformers.server.config import ConfigError, ServerConfig, is_loopback
from ktransformers.server.errors import RequestError
from ktransformers.server.key_file import read_key_file
from ktransformers.server.tenants.directory import Directory, View
from ktransformers.server.tenants.limits import Subjects
from ktransformers.server.tenants.records import READ, READ_ALL, Key, Project

ADMIN = "admin"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY_LENGTH = range(8, 513)
_ROLE, _SCOPE = "__ktransformers_role__", "__ktransformers_scope__"
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class Role(Enum):
    """Who may call a route: anybody, the holder of any key, the operator."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Whom a request is done for. `key_hash` (8 hex digits) is what logs may say about the key."""

    tenant: str
    """Id of the project; the key's name for a key of the settings; "" for an administrator of the store."""
    is_admin: bool
    key_hash: str
    name: str = ""
    """What people call the tenant."""
    key: str = ""
    """Id of the key in the ledger."""
    share: Tenant = dataclasses.field(default_factory=lambda: Tenant(""))
    """What the scheduler is to know."""
    cache_scope: bytes = b""
    """Prefix blocks are shared only inside it; derived here, never taken from the client."""
    limits: Subjects = ()
    models: frozenset[str] = frozenset()
    """Those it may use; empty: all."""
    scopes: frozenset[str] = frozenset()
    """What it may do with them; empty: all."""

    def may(self, scope: str) -> bool:
        """Whether the key was not narrowed to other things."""
        return not self.scopes or scope in self.scopes or (scope == READ and READ_ALL in self.scopes)

    def may_use(self, model: str) -> bool:
        """Whether the tenant may use, and know of, the model."""
        return not self.models or model in self.models


ANONYMOUS = Caller("anonymous", False, "")
"""On public routes, which do nothing in anybody's name."""
LOCAL = Caller("default", True, "", "default", "", Tenant("default", weight=PRIORITIES["normal"]))
"""Anybody on loopback while there is neither a key nor a tenant."""


def requires(role: Role, scope: str = READ) -> Callable[[Endpoint], Endpoint]:
    """Declare the role of an endpoint, and of a user's the scope that a narrowed key needs."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ROLE, role)
        setattr(endpoint, _SCOPE, scope)
        return endpoint

    return declare


def declared_role(endpoint: Callable[..., Any]) -> Role | None:
    """The role that `requires` gave to an endpoint."""
    role: Role | None = getattr(endpoint, _ROLE, None)
    return role


def declared_scope(endpoint: Callable[..., Any]) -> str:
    """The scope that `requires` gave to an endpoint."""
    scope: str = getattr(endpoint, _SCOPE, READ)
    return scope


class Keys:
    """The keys of the settings, as SHA-256 (they are random, so a slow hash would protect nothing), and those
    of the tenant store as they are at the moment."""

    def __init__(self, keys: Iterable[tuple[str, str]], directory: Directory | None = None) -> None:
        """`keys` are (name or "", key). Raises ConfigError for a bad name, a bad length or a key that stands
        twice."""
        self.directory = directory or Directory()
        self._local = dataclasses.replace(LOCAL, cache_scope=self.directory.cache_scope(LOCAL.tenant))
        self._callers: dict[bytes, Caller] = {}
        self._view = View()
        self._of_view: dict[str, Caller] = {}
        """By id of the key, as long as the view is the same."""
        for name, key in keys:
            if len(key) not in _KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"API key {name or '(unnamed)'}: must be 8 to 512 printable ASCII characters"
                )
            digest = hashlib.sha256(key.encode()).digest()
            name = name or f"key-{digest.hex()[:8]}"
            if not _NAME.fullmatch(name) or name.startswith("proj_"):
                raise ConfigError("API key with a bad name: letters, digits, '.', '_', '-', at most 64")
            if digest in self._callers:
                raise ConfigError(f"API key {name}: the same key stands there twice")
            self._callers[digest] = self._of_settings(name, digest.hex()[:8])

    @classmethod
    def load(cls, config: ServerConfig, directory: Directory | None = None) -> "Keys":
        """Keys of the key file and of the store. Raises ConfigError; among others when there are none
        although the address listened on can be reached from other machines."""
        keys = [] if config.api_key_file is None else read_key_file(Path(config.api_key_file))
        found = cls(keys, directory)
        if not keys and not found.directory.view.in_use and not is_loopback(config.host):
            raise ConfigError(
                f"listening on {config.host} needs at least one API key: `ktransformers tenants create NAME`"
            )
        return found

    def identify(self, headers: Headers) -> Caller | None:
        """The caller by `Authorization: Bearer KEY` or `x-api-key: KEY`; None when the key is missing,
        unknown or expired."""
        if not self._callers and not self.directory.view.in_use:
            return self._local
        given, found = _digest(headers), None
        for digest, caller in self._callers.items():  # all of them: the time must not tell which one matched
            if hmac.compare_digest(digest, given):
                found = caller
        return found or self.stored(given)

    def stored(self, digest: bytes) -> Caller | None:
        """The caller whose key has this SHA-256 in the tenant store, unless it was revoked or has expired."""
        view = self.directory.view
        key = view.find(digest)
        return None if key is None else self._of_store(view, key)

    def authorize(self, role: Role, headers: Headers, scope: str = READ) -> Caller:
        """The caller, if it may call a route of that role and scope; else RequestError."""
        if role is Role.PUBLIC:
            return ANONYMOUS
        caller = self.identify(headers)
        if caller is None:
            raise _unknown()
        if role is Role.ADMIN and not caller.is_admin:
            raise RequestError("permission_denied", "this route needs the key of an administrator")
        if role is Role.USER:
            if not caller.tenant:
                raise RequestError("permission_denied", "an admin key has no tenant; use a tenant's key")
            if not caller.may(scope):
                raise RequestError("permission_denied", f"this key does not have the scope {scope}")
        return caller

    def _of_settings(self, name: str, key_hash: str) -> Caller:
        share = Tenant(name, weight=PRIORITIES["normal"])
        scope = self.directory.cache_scope(name)
        return Caller(name, name == ADMIN, key_hash, name, key_hash, share, scope)

    def _of_store(self, view: View, key: Key) -> Caller:
        if view is not self._view:
            self._view, self._of_view = view, {}
        caller = self._of_view.get(key.id)
        if caller is None:
            caller = self._make(view.projects[key.project] if key.project else None, key)
            self._of_view[key.id] = caller
        return caller

    def _make(self, project: Project | None, key: Key) -> Caller:
        key_hash = key.digest.hex()[:8]
        if project is None:
            return Caller("", True, key_hash, ADMIN, key.id)
        limits = project.limits
        share = Tenant(
            project.id,
            key.account,
            project.share,
            limits.max_running or 0,
            limits.max_waiting or 0,
            kv_bytes=(limits.kv_device_bytes or 0, limits.kv_host_bytes or 0, limits.kv_disk_bytes or 0),
        )
        # A project's answers wait in the scheduler, which knows how many run.
        rates = msgspec.structs.replace(limits, max_running=None, max_waiting=None)
        return Caller(
            project.id, False, key_hash, project.name, key.id, share, self.directory.cache_scope(project.id),
            ((project.id, rates), (key.id, key.limits)), project.models, key.scopes,
        )  # fmt: skip


class AdminKeys:
    """Who may use the admin API: administrators of the store, from wherever they call."""

    def __init__(self, directory: Directory) -> None:
        self._keys = Keys((), directory)

    def authorize(self, role: Role, headers: Headers, scope: str = READ) -> Caller:
        """The caller, if it may call a route of that role; else RequestError."""
        if role is Role.PUBLIC:
            return ANONYMOUS
        caller = self._keys.stored(_digest(headers))
        if caller is None:
            raise _unknown()
        if not caller.is_admin:
            raise RequestError(
                "permission_denied", "this needs an admin key: `ktransformers tenants admin-key NAME`"
            )
        return caller


def _digest(headers: Headers) -> bytes:
    """SHA-256 of the key that a request brings."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _unknown() -> RequestError:
    return RequestError(
        "invalid_api_key",
        "missing, unknown or expired API key; send it as 'Authorization: Bearer KEY'",
        headers={"WWW-Authenticate": "Bearer"},
    )
