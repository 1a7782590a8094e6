"""How far the KV of what runs will grow: the watermark of admission.

Blocks are taken as tokens come, so more may be let in than would fit if all wrote their max_tokens. How
many more is a bet on their output lengths; a lost bet costs a preemption, whose tokens may have to be
computed again.
"""

import bisect
import itertools
import math
from collections import deque
from collections.abc import Iterable

from ktransformers.scheduler.request import Request

_RECENT = 64
"""Output lengths remembered."""
_PRIOR_DECAY = 15 / 16
_RAISE = 1.5
_MOST = 8.0
_DECAY = 0.998
"""A step; after some 350 steps the factor is halved."""


class OutputEstimate:
    """How many tokens a request will still draw, from how many those did that ended of late.

    Of the recent outputs that were longer than what it has drawn so far, the average of what was still to
    come: who has outlived the short ones is known to be one of the long. While little has been observed its
    max_tokens counts too, less with each observation, for the first to end are the short ones. All that
    times a factor which each preemption raises and each step lets decay towards 1 (SGLang's new-token
    ratio, turned round).
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.prior = 1.0
        """The weight of max_tokens."""
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._sums: list[int] = []
        """Of the longest 1, 2, ... of them."""

    def ended(self, output_tokens: int) -> None:
        """A request has ended by itself after so many output tokens."""
        self.prior *= _PRIOR_DECAY
        self._recent.append(output_tokens)
        bisect.insort(self._sorted, output_tokens)
        if len(self._recent) > _RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._sums = list(itertools.accumulate(reversed(self._sorted)))

    def preempted(self) -> None:
        """More was let in than fitted."""
        self.factor = min(self.factor * _RAISE, _MOST)

    def stepped(self) -> None:
        """A step was planned."""
        self.factor = max(self.factor * _DECAY, 1.0)

    def left(self, request: Request) -> int:
        """Tokens that it will still draw."""
        most = request.sampling.max_tokens - request.drawn
        longer = len(self._sorted) - bisect.bisect_right(self._sorted, request.drawn)
        # What has outlived all others is expected to go on for as long again.
        expected = self._sums[longer - 1] / longer - request.drawn if longer else request.drawn
        blend = self.prior * most + (1 - self.prior) * expected
        return min(most, math.ceil(blend * self.factor))


def peak_blocks(shared: int, runs: Iterable[tuple[int, int]], block_tokens: int) -> int:
    """The most blocks that will be held at once if each sequence draws a token a step and leaves at its end.

    `runs`: (blocks that it holds alone, its prompt's yet to come among them; tokens that it will still
    draw). `shared`: blocks held by more than one, which are never counted as freed. (The idea is the
    "Past-Future" scheduler's.)
    """
    by_end = sorted(runs, key=lambda run: run[1])
    held = sum(own for own, _ in by_end)
    peak = held
    alive = len(by_end)
    grown = 0
    for own, left in by_end:
        # Just before this one leaves, everybody still there has grown by `left` tokens.
        grown = -(-left // block_tokens)
        peak = max(peak, held + alive * grown)
        held -= own
        alive -= 1
    return shared + peak
