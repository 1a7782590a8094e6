"""What the scheduler counts, and the pace it measures."""

from dataclasses import dataclass

_DECAY = 0.999
"""A step; the slowest one of the last thousand or so counts."""
_DECAY_LONGEST = 0.98
_WEIGHT = 1 / 32
"""Of the newest step in the averages."""


@dataclass
class Counters:
    """Since the start of this process; see scheduler.protocol.Status."""

    steps: int = 0
    step_seconds: float = 0.0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    engine_restarts: int = 0
    entered: int = 0
    """Requests that were let in, by which they are ranked: also those of an engine that died."""


class Pace:
    """How long a step takes, from those that were measured."""

    def __init__(self) -> None:
        self._slowest = 0.0
        self._longest = 0.0
        self._tokens = 0.0
        self._seconds = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """A step computed `tokens` tokens in `seconds`."""
        if tokens <= 0:
            return
        self._slowest = max(seconds / tokens, self._slowest * _DECAY)
        self._longest = max(seconds, self._longest * _DECAY_LONGEST)
        self._tokens += (tokens - self._tokens) * _WEIGHT
        self._seconds += (seconds - self._seconds) * _WEIGHT

    @property
    def longest_step(self) -> float:
        """Seconds of the longest step of late; 0 while nothing was measured."""
        return self._longest

    def at_most(self, tokens: int) -> float | None:
        """Seconds that a step of `tokens` tokens should not exceed; None while nothing was measured.

        The slowest seconds per token are those of a lone decode, so this errs on the side of patience.
        """
        return tokens * self._slowest if self._slowest else None

    def expected(self, tokens: int) -> float:
        """Seconds that `tokens` tokens take at the present throughput; 0 while nothing was measured."""
        return tokens * self._seconds / self._tokens if self._tokens else 0.0
