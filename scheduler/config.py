"""Settings of the scheduler process."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from ktransformers.engine.config import EngineConfig

_MEAN_PROMPT: Final = 4096
Seconds = Annotated[float, Meta(ge=0, le=86400)]


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may wait, for how long, and how the engine's step is filled."""

    engine: EngineConfig
    policy: Literal["fair", "vtc", "fifo"] = "fair"
    """Who is next. fair: by weight, within `fair_window` and `fair_preempt`. vtc: virtual counters alone.
    fifo: first come, first served. The last two are there to be compared with."""
    fair_window: Seconds = 2.0
    """Seconds of service that a tenant may be ahead of the neediest and still go first, for a cached prefix;
    and that may go ahead of a request for which room is kept."""
    fair_preempt: Seconds = 10.0
    """Seconds of service that a tenant may be ahead before a request of its own makes room; 0: never."""
    tbt_slo: Seconds = 0.25
    """Seconds that a step may take while streams run: prompts are cut so that they fit. 0: no limit."""
    max_waiting: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    """Requests that may wait; the next one is refused as overloaded. Their prompts have 4,096 tokens on
    average at most."""
    socket: str = ""
    """Path of the scheduler's unix socket; the supervisor fills it in."""

    @property
    def max_waiting_tokens(self) -> int:
        """Prompt tokens that may wait."""
        return self.max_waiting * _MEAN_PROMPT
