"""Who may call what: API keys, and the role that every route declares.

A key's name is its tenant. The name `admin` is the operator: it alone may call admin routes. Without any key
configured the server listens on loopback only, and whoever is on the machine is the operator.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from starlette.datastructures import Headers

from ktransformers.server.config import ConfigError, ServerConfig, is_loopback
from ktransformers.server.errors import RequestError

ADMIN = "admin"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY_LENGTH = range(8, 513)
_ROLE = "__ktransformers_role__"
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
    is_admin: bool
    key_hash: str

    @property
    def cache_scope(self) -> bytes:
        """Prefix blocks are shared only inside it; derived here, never taken from the client."""
        return hashlib.sha256(b"ktransformers cache scope:" + self.tenant.encode()).digest()[:16]


ANONYMOUS = Caller("anonymous", False, "")
"""On public routes, which do nothing in anybody's name."""
LOCAL = Caller("default", True, "")
"""Anybody on loopback while no key is configured."""


def requires(role: Role) -> Callable[[Endpoint], Endpoint]:
    """Declare the role of an endpoint."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ROLE, role)
        return endpoint

    return declare


def declared_role(endpoint: Callable[..., Any]) -> Role | None:
    """The role that `requires` gave to an endpoint."""
    role: Role | None = getattr(endpoint, _ROLE, None)
    return role


class Keys:
    """The configured keys, as SHA-256 (they are random, so a slow hash would protect nothing)."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        """`keys` are (name or "", key). Raises ConfigError for a bad name, a bad length or a key that stands
        twice."""
        self._callers: dict[bytes, Caller] = {}
        for name, key in keys:
            if len(key) not in _KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"API key {name or '(unnamed)'}: must be 8 to 512 printable ASCII characters"
                )
            digest = hashlib.sha256(key.encode()).digest()
            name = name or f"key-{digest.hex()[:8]}"
            if not _NAME.fullmatch(name):
                raise ConfigError("API key with a bad name: letters, digits, '.', '_', '-', at most 64")
            if digest in self._callers:
                raise ConfigError(f"API key {name}: the same key stands there twice")
            self._callers[digest] = Caller(name, name == ADMIN, digest.hex()[:8])

    @classmethod
    def load(cls, config: ServerConfig) -> "Keys":
        """Keys of the settings and of the key file. Raises ConfigError; among others when there are none
        although the address listened on can be reached from other machines."""
        keys = [("", key) for key in config.api_keys]
        if config.api_key_file is not None:
            keys += _read_key_file(Path(config.api_key_file))
        if not keys and not is_loopback(config.host):
            raise ConfigError(f"listening on {config.host} needs at least one API key")
        return cls(keys)

    def identify(self, headers: Headers) -> Caller | None:
        """The caller by `Authorization: Bearer KEY` or `x-api-key: KEY`; None when the key is missing or
        unknown."""
        if not self._callers:
            return LOCAL
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        given = hashlib.sha256(key.encode("latin-1", "replace")).digest()
        found = None
        for digest, caller in self._callers.items():  # all of them: the time must not tell which one matched
            if hmac.compare_digest(digest, given):
                found = caller
        return found

    def authorize(self, role: Role, headers: Headers) -> Caller:
        """The caller, if it may call a route of that role; else RequestError."""
        if role is Role.PUBLIC:
            return ANONYMOUS
        caller = self.identify(headers)
        if caller is None:
            raise RequestError(
                "invalid_api_key",
                "missing or unknown API key; send it as 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if role is Role.ADMIN and not caller.is_admin:
            raise RequestError("permission_denied", "this route needs the key named 'admin'")
        return caller


def _read_key_file(path: Path) -> list[tuple[str, str]]:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"API key file {path}: not a regular file")
            if stat.S_IMODE(mode) & 0o077:
                raise ConfigError(f"API key file {path}: others can read it; chmod 600 {path}")
            lines = [line.strip() for line in file]
    except OSError as error:
        raise ConfigError(f"API key file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"API key file {path}: not ASCII text") from None
    keys = []
    for line in lines:
        if line and not line.startswith("#"):
            name, _, key = line.rpartition(":")
            keys.append((name.strip(), key.strip()))
    if not keys:
        raise ConfigError(f"API key file {path}: no key in it")
    return keys
