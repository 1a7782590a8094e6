"""What the store holds: tenants (projects), who acts for them, their keys, and the limits of both."""

import hashlib
import secrets
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from ktransformers.scheduler.protocol import PRIORITIES

Priority = Literal["low", "normal", "high"]
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
"""Times the factor of a priority, within what the scheduler takes."""

READ, REQUEST, READ_ALL = "api.model.read", "api.model.request", "api.all.read"
SCOPES = (READ, REQUEST, READ_ALL)
"""What a key may be narrowed to, in OpenAI's words: look at models, ask them, look at everything."""

KEY_PREFIX, ADMIN_KEY_PREFIX = "kt-", "kt-admin-"
MAX_NAME = 64

MAX_LIMIT = (1 << 53) - 1
Limit = Annotated[int, Meta(ge=1, le=MAX_LIMIT)]


class StoreError(ValueError):
    """The store cannot be used, or what was asked of it makes no sense; one line for the operator."""


class Missing(StoreError):
    """There is no such project, account or key."""


class Conflict(StoreError):
    """The name is taken."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a project, or a single key, may use. None is no limit."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Prompt and output tokens together."""
    tokens_per_day: Limit | None = None
    """The same in one day (UTC): a quota, which waiting a moment does not bring back."""
    requests_per_day: Limit | None = None
    max_running: Limit | None = None
    """Answers computed at one time. Of a project, further ones wait in the scheduler's queue; a key has no
    queue of its own, so further ones are refused."""
    max_waiting: Limit | None = None
    """Answers that may wait. Of a key, how many may be open beyond `max_running`."""
    kv_device_bytes: Limit | None = None
    """Of a project: KV that is kept for it on the device, whatever others ask for; None is a share by weight.
    What it does not use others borrow, and it may borrow what others do not use."""
    kv_host_bytes: Limit | None = None
    kv_disk_bytes: Limit | None = None


NO_LIMITS = Limits()


class Project(msgspec.Struct, frozen=True):
    """A tenant."""

    id: str
    name: str
    created_at: int
    """Unix seconds, as all times here."""
    archived_at: int | None
    weight: float
    priority: Priority
    limits: Limits
    models: frozenset[str]
    """Those it may use; empty: all."""

    @property
    def share(self) -> float:
        """Its weight in the scheduler, with the priority in it."""
        return self.weight * PRIORITIES[self.priority]


class Account(msgspec.Struct, frozen=True):
    """A user of a project, who owns keys: it stays the same when a key is replaced by the next one."""

    id: str
    project: str
    name: str
    created_at: int


class Key(msgspec.Struct, frozen=True):
    """An API key of a project, or (project and account are "") of an administrator."""

    id: str
    project: str
    account: str
    name: str
    digest: bytes
    """SHA-256. The key is random, so a slow hash would protect nothing."""
    redacted: str
    scopes: frozenset[str]
    """Of SCOPES; empty: all."""
    limits: Limits
    created_at: int
    expires_at: int | None
    last_used_at: int | None


class PublicPrefix(msgspec.Struct, frozen=True):
    """The beginning of prompts, whose KV every tenant may find: nothing else is public."""

    id: str
    name: str
    created_at: int
    body: str
    """JSON: {"text": …} or {"messages": […]}."""


class AuditEntry(msgspec.Struct, frozen=True):
    """One act of an administrator."""

    id: int
    at: int
    actor: str
    """Id of the admin key, or `cli:` and the name of the system's user."""
    action: str
    project: str
    target: str
    details: dict[str, object]


class Used(NamedTuple):
    """By a project or a key, on one day."""

    requests: int = 0
    tokens: int = 0
    """Prompt and output."""


class UsageRow(msgspec.Struct, frozen=True):
    """What was used between `start` and the end of its minute or day, as the ledger has it."""

    start: int
    project: str
    key: str
    model: str
    requests: int
    input: int
    cached: int
    output: int
    reasoning: int
    """Among those of the output."""


def new_id(kind: str) -> str:
    """`proj_1f…`: 64 random bits behind the kind."""
    return f"{kind}_{secrets.token_hex(8)}"


def new_key(prefix: str) -> tuple[str, bytes, str]:
    """A key of 256 random bits, its SHA-256, and what may be shown of it later."""
    value = prefix + secrets.token_urlsafe(32)
    return value, hashlib.sha256(value.encode()).digest(), f"{prefix}…{value[-4:]}"


def check_name(name: str) -> str:
    """A name is shown in terminals, metrics and audit logs. Errors: StoreError."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise StoreError(f"a name has 1 to {MAX_NAME} printable characters and no space around it")
    if name.startswith("proj_"):
        raise StoreError("a name must not begin with 'proj_': that is how the ids of projects begin")
    return name


def check_weight(weight: float) -> float:
    """Errors: StoreError."""
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # NaN is neither
        raise StoreError(f"a weight is between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}")
    return weight


def check_limits(limits: Limits) -> Limits:
    """What the store could not read back is not written. Errors: StoreError."""
    for name in Limits.__struct_fields__:
        value = getattr(limits, name)
        if value is not None and not 1 <= value <= MAX_LIMIT:
            raise StoreError(f"{name.replace('_', ' ')}: a limit is between 1 and {MAX_LIMIT}")
    return limits


def check_scopes(scopes: frozenset[str]) -> frozenset[str]:
    """Errors: StoreError."""
    if unknown := sorted(scopes - set(SCOPES)):
        raise StoreError(f"unknown scope {unknown[0][:64]!r}: there are {', '.join(SCOPES)}")
    return scopes
