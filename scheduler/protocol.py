"""What crosses the socket between the API process and the scheduler.

Law: every Submit is answered by exactly one terminal event, a TokenEvent with `finish` set or a Failed,
whatever dies in between (the client side invents it when the scheduler itself is gone).
"""

import msgspec

from ktransformers.engine.protocol import Sampling
from ktransformers.kvcache.manager import PUBLIC_SCOPE

__all__ = [
    "PUBLIC_SCOPE",
    "Cancel",
    "Drain",
    "Failed",
    "FromScheduler",
    "Hello",
    "Logprobs",
    "Sampling",
    "Status",
    "Submit",
    "Tenant",
    "TenantStatus",
    "TierStatus",
    "ToScheduler",
    "TokenEvent",
    "Tokens",
    "Withdraw",
]


# ---- server -> scheduler

PRIORITIES = {"low": 0.25, "normal": 1.0, "high": 4.0}
"""Priority class -> factor of the weight: a share, not a strict order, so that nothing starves. Normal is 1,
as the default weight is: the fairness window and the like are sized for weights about 1."""


class Tenant(msgspec.Struct, frozen=True, array_like=True):
    """Whose request it is and what it is entitled to; what the newest Submit says holds for all of them.

    Tenants share the engine by weight; within a tenant its users share alike.
    """

    id: str
    user: str = ""
    """Second level: a user or a key of the tenant."""
    weight: float = 1.0
    """Share of the engine relative to the other tenants', 0.001 .. 1000: the tenant's own weight times the
    factor of its priority class (PRIORITIES)."""
    max_running: int = 0
    """Requests computed at once; 0: no limit. More wait."""
    max_waiting: int = 0
    """Requests that may wait; 0: no limit of its own. The next one fails with code "rate_limited"."""
    max_waiting_tokens: int = 0
    """Their prompt tokens; 0: no limit of its own."""
    kv_bytes: tuple[int, int, int] = (0, 0, 0)
    """Cached KV that is kept for it on the device, the host and the disk; 0: a share by weight."""


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Generate from `tokens`."""

    id: str
    tenant: Tenant
    tokens: list[int]
    sampling: Sampling
    deadline: float
    """Seconds from now after which the request fails with code "deadline"; 0: none."""
    cache_scope: bytes
    """Prefix blocks are shared only between requests of one scope (the tenant's salt); what was computed in
    PUBLIC_SCOPE is found by all, and only the server itself submits with that."""


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget a request: it is answered by finish "cancelled" unless it had ended. Unknown ids are ignored."""

    id: str


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """First message after (re)connecting and once a second after; answered by Status.

    Three seconds without one and the scheduler cancels what that front end had submitted.
    """


class Drain(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Refuse new requests with code "draining"; running ones go on."""


class Withdraw(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What was computed of these tokens in PUBLIC_SCOPE is found by nobody from now on."""

    tokens: list[int]


ToScheduler = Submit | Cancel | Hello | Drain | Withdraw


# ---- scheduler -> server


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one drawn token and of the likeliest ones."""

    logprob: float
    top: list[tuple[int, float]]


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """News of one request."""

    id: str
    tokens: list[int]
    logprobs: list[Logprobs]
    """One for each token when they were asked for, else empty."""
    finish: str = ""
    """"" goes on; "stop", "length", "cancelled" end it. A stop token that was drawn is among `tokens`."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed; set with the first event."""
    queue_seconds: float = 0.0
    """From Submit to its first step; set with the first event."""


class Tokens(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All news of one step for one front end."""

    events: list[TokenEvent]


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The terminal event of a request that could not be done.

    Codes: "context_length_exceeded", "invalid_request" (client's fault, 400); "rate_limited" (429: a limit of
    the tenant's own, with retry_after); "overloaded" (the server is full), "draining", "not_ready" (503, with
    retry_after); "deadline" (408 / 504); "engine_restarted", "numerical_error",
    "internal" (500).
    """

    id: str
    code: str
    message: str
    retry_after: float = 0.0


class TenantStatus(msgspec.Struct, frozen=True, array_like=True):
    """One tenant, as the scheduler sees it."""

    id: str
    weight: float
    waiting: int
    running: int
    service: float
    """Cost of what was computed for it since it was last unknown, in units (an input token is 1)."""
    backlogged_service: float = 0.0
    """Of that, while it had something waiting."""
    due: float = 0.0
    """Its share by weight of what was computed meanwhile for all that had something waiting."""
    kv_bytes: tuple[int, int, int] = (0, 0, 0)
    """Cached KV that it has on the device, the host and the disk."""


class TierStatus(msgspec.Struct, frozen=True, array_like=True):
    """One tier of the KV cache. What counts is since the engine was started."""

    name: str
    """device, host or disk."""
    bytes_total: int
    bytes_used: int
    hit_tokens: int
    """Prompt tokens that were not computed because their KV was here, and in no faster tier."""
    evictions: int
    loads: int
    """Blocks copied from here to the device."""
    load_failures: int
    load_bytes: int
    load_seconds: float
    stores: int
    """Blocks copied to here."""
    store_failures: int
    store_bytes: int
    store_seconds: float


class Status(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Once a second and on change of `ready`."""

    ready: bool
    """The engine is loaded and its step counter advances when there is work."""
    detail: str
    """What is missing when not ready: "loading 40 %", "engine restarting", ..."""
    draining: bool
    max_len: int
    vocab: int
    isa: str
    waiting: int
    running: int
    blocks_total: int
    blocks_used: int
    """Held by a sequence; cached blocks that could be evicted at once are not counted."""
    blocks_cached: int
    steps: int
    step_seconds: float
    """Sum over all steps."""
    computed_tokens: int
    recomputed_tokens: int
    """Computed a second time because of a preemption."""
    generated_tokens: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    preemptions: int
    engine_restarts: int
    tiers: list[TierStatus] = []
    load_waits: int = 0
    """Requests that had their turn and waited for their KV to be loaded."""
    load_timeouts: int = 0
    """Those that waited in vain, and were computed."""
    tenants: list[TenantStatus] = []
    """Those with most service, 32 at most."""


FromScheduler = Tokens | Failed | Status
