"""How far the KV of what runs will grow: the watermark of admission.

Blocks are taken as tokens come, so more may be let in than would fit if all wrote their max_tokens. How
many more is a bet on their output lengths; a lost bet costs a preemption, whose tokens may have to be
computed again.
"""

import bisect
import itertools
import math
import operator
from collections import OrderedDict, deque
from collections.abc import Iterable

from ktransformers.scheduler.request import Request

MOST_PREEMPTIONS = 3
"""After so many a request is let in only if all that it may ever take fits, and stays."""
_RECENT = 64
"""Output lengths remembered."""
_ENOUGH = 8
"""Of a tenant's own, to go by them alone."""
_MOST_TENANTS = 1024
_PRIOR_DECAY = 63 / 64
_FIRST = 2.5
"""The first to end are the short ones, so what is expected at the beginning is too little."""
_RAISE = 1.5
_MOST = 8.0
_DECAY = 0.9998
"""A step; after some 3,500 steps, a few lives of the longest requests, the factor is halved."""


class _Lengths:
    """The last output lengths of somebody's requests."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._means: list[float] = []
        """Of the i-th shortest and all that are longer."""
        self.enough = False
        """There are so many that they count."""

    def add(self, tokens: int) -> None:
        self._recent.append(tokens)
        bisect.insort(self._sorted, tokens)
        if len(self._recent) > _RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        longest_first = itertools.accumulate(reversed(self._sorted))
        self._means = [total / n for n, total in enumerate(longest_first, 1)][::-1]
        self.enough = len(self._recent) >= _ENOUGH

    def left(self, drawn: int) -> float:
        """What was still to come, on the average, of those that were longer."""
        shorter = bisect.bisect_right(self._sorted, drawn)
        # What has outlived all others is expected to go on for as long again.
        return self._means[shorter] - drawn if shorter < len(self._means) else float(drawn)


class OutputEstimate:
    """How many tokens a request will still draw, from how many those did that ended of late.

    Of the recent outputs that were longer than what it has drawn so far, the average of what was still to
    come: who has outlived the short ones is known to be one of the long. Its tenant's own count once there
    are some: one that writes briefly and often says nothing of one that writes at length. While little has
    been observed its max_tokens counts too, less with each observation, for the first to end are the short
    ones. All that times a factor which is large at first, which each preemption raises and each step lets
    decay towards 1 (SGLang's new-token ratio, turned round).
    """

    def __init__(self) -> None:
        self.factor = _FIRST
        self.prior = 1.0
        """The weight of max_tokens."""
        self._all = _Lengths()
        self._by_tenant: OrderedDict[str, _Lengths] = OrderedDict()

    def ended(self, tenant: str, output_tokens: int) -> None:
        """A request of a tenant has ended by itself after so many output tokens."""
        self.prior *= _PRIOR_DECAY
        self._all.add(output_tokens)
        self._by_tenant.setdefault(tenant, _Lengths()).add(output_tokens)
        self._by_tenant.move_to_end(tenant)
        if len(self._by_tenant) > _MOST_TENANTS:
            self._by_tenant.popitem(last=False)

    def preempted(self) -> None:
        """More was let in than fitted."""
        self.factor = min(self.factor * _RAISE, _MOST)

    def stepped(self) -> None:
        """A step was planned."""
        self.factor = max(self.factor * _DECAY, 1.0)

    def left(self, request: Request) -> int:
        """Tokens that it will still draw."""
        drawn = request.drawn
        most = request.sampling.max_tokens - drawn
        if request.preempted >= MOST_PREEMPTIONS:
            return most
        own = self._by_tenant.get(request.tenant.id)
        lengths = own if own is not None and own.enough else self._all
        blend = self.prior * most + (1 - self.prior) * lengths.left(drawn)
        left = math.ceil(blend * self.factor)
        return left if left < most else most


class Profile:
    """How many blocks will be held as time goes by, if each sequence draws a token a step and leaves at its
    end. (The idea is the "Past-Future" scheduler's.)
    """

    def __init__(self, shared: int, runs: Iterable[tuple[int, int]], block_tokens: int) -> None:
        """`runs`: (blocks that it holds alone, its prompt's yet to come among them; tokens that it will still
        draw). `shared`: blocks held by more than one, which are never counted as freed."""
        by_end = sorted(runs, key=lambda run: run[1])
        count = len(by_end)
        self._size = block_tokens
        self._ends = [left for _, left in by_end]
        grown = [-(-left // block_tokens) for left in self._ends]
        # Of those from the i-th end on: what they hold now.
        self._held = list(itertools.accumulate((own for own, _ in reversed(by_end)), initial=shared))[::-1]
        # Just before the i-th leaves everybody still there has grown by as much as it has.
        peaks = [self._held[i] + (count - i) * grown[i] for i in range(count)]
        self._before = list(itertools.accumulate(map(operator.add, peaks, grown), max, initial=0))
        self._after = list(itertools.accumulate(reversed(peaks), max, initial=shared))[::-1]

    def peak_with(self, own: int, left: int) -> int:
        """The most that are held at once while one more is there, which comes now and takes `own` blocks.

        What comes after its end is not its doing: when more was let in than will fit, that is no reason to
        keep out who will have left by then.
        """
        leave_first = bisect.bisect_right(self._ends, left)
        alive = len(self._ends) - leave_first + 1
        at_its_end = self._held[leave_first] + own + alive * -(-left // self._size)
        now = self._held[0] + own
        return max(now, self._before[leave_first] + own, at_its_end)

    def spares(self, total: int, first: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether `other` (own, left) may come now without `first`, which does not fit yet, entering later.

        `first` is taken to enter as soon as its final size fits beside all that will still be there.
        """
        size_of_first, size_of_other = (own + -(-left // self._size) for own, left in (first, other))
        room = total - size_of_first
        # _after does not grow: the first index where what remains leaves the room.
        gone = bisect.bisect_left(self._after, -room, key=operator.neg)
        if gone >= len(self._after):
            return False
        enters = self._ends[gone - 1] if gone else 0
        return other[1] <= enters or self._after[gone] + size_of_other <= room
