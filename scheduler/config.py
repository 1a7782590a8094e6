"""Settings of the scheduler process."""

from typing import Annotated

import msgspec
from msgspec import Meta

from ktransformers.engine.config import EngineConfig


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may wait, for how long, and how the engine's step is filled."""

    engine: EngineConfig
    max_waiting: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    """Requests that may wait; the next one is refused as overloaded."""
    max_waiting_tokens: Annotated[int, Meta(ge=1, le=1 << 40)] = 4_194_304
    """Prompt tokens that may wait."""
    socket: str = ""
    """Path of the scheduler's unix socket; the supervisor fills it in."""
