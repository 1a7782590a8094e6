"""Who is let in next: the fair queue's order against what fits.

Of the tenants whose key is within the window Q of the least, the one whose next request is urgent, or else
finds most of itself in the cache, goes first. If the request of the tenant with the least key does not fit,
room is kept for it, and others go ahead only if that does not delay it, within the window Q + B and for a
cost of B in all. If it is owed more than the gap that is allowed, a request of the most served tenant makes
room, provided that this one's room is enough.
"""

import bisect
import math
from dataclasses import dataclass

from ktransformers.kvcache.blocks import BlockId
from ktransformers.kvcache.manager import KVCache
from ktransformers.scheduler.accounts import Account
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.growth import MOST_PREEMPTIONS, OutputEstimate, Profile
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.stats import Counters, Pace

_LOOK = 16
"""Tenants in the window whose next requests are compared."""
_SCAN = 32
"""Tenants looked through for one that may go ahead."""
_LEAST_HIT = 128
"""Tokens found in the cache for which a request goes before one that is owed more."""
_NEWCOMERS_SLOT = 8
"""With so many slots one is kept for a tenant that has none. In the simulator that costs 0.3 % of the
throughput with eight, and nothing with 32."""
_RECOMPUTED_SHARE = 0.03
"""Of all computed tokens: so many may be computed again for fairness' sake, and nobody is preempted for it
where it would be more."""


@dataclass(frozen=True)
class Entry:
    """A request that may be let in."""

    request: Request
    found: list[BlockId]
    own: int
    """Blocks that it will take alone when it enters."""
    idle: int
    """Blocks of `found` that nobody holds."""
    left: int
    """Tokens that it is expected to draw."""

    @property
    def size(self) -> tuple[int, int]:
        """(blocks from the pool, tokens to draw)."""
        return self.own + self.idle, self.left


class Entrance:
    """The door of one engine's slots."""

    def __init__(
        self,
        cache: KVCache,
        queue: FairQueue,
        estimate: OutputEstimate,
        counters: Counters,
        pace: Pace,
        slots: int,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._estimate = estimate
        self._counters = counters
        self._pace = pace
        self._slots = slots
        self._surplus = queue.rules.kv_share
        self._unfit: set[Request] = set()
        """They did not fit when last looked at, and nobody has left since."""
        self._profile: Profile | None = None
        self._at_most = 0
        """Blocks that all that runs would hold if each drew all that it may."""
        self._together: int | None = None
        """... if nobody left before all have grown as far as is expected."""
        self._runs: dict[Request, tuple[int, tuple[int, int]]] = {}
        """Of what runs, as long as it neither grows nor leaves: blocks that it holds alone; that and its
        prompt's yet to come, and the tokens that it will still draw."""
        self._kept_for: Request | None = None
        """The request that room is kept for, and what went ahead of it."""
        self._went_ahead = 0
        self._went_ahead_last: Request | None = None
        self._ahead_cost = 0
        self._now = 0.0
        self._promised: Request | None = None
        """Somebody made room for this one."""
        self._put_back = 0
        """Tokens of those that made room, which are to be computed again."""

    def gone(self, request: Request) -> None:
        """One that waited has ended: nobody need make room for it."""
        self._put_back -= request.most_computed
        self._unfit.discard(request)
        if request is self._promised:
            self._promised = None
        if request is self._kept_for:
            self._kept_for = None

    def left(self, request: Request) -> None:
        """It has left: all may be different."""
        self._at_most -= self._most_blocks(request)
        self._unfit.clear()
        self.grown()

    def put_back(self, request: Request) -> None:
        """It had to make room."""
        self._put_back += request.most_computed

    def grown(self) -> None:
        """What runs has grown."""
        self._profile = self._together = None
        self._runs.clear()

    def check(self, running: list[Request]) -> None:
        """Errors: AssertionError when what is known of those that run is not so."""
        if self._at_most != sum(map(self._most_blocks, running)):
            raise AssertionError("the room that what runs may take is out of count")

    # ---- the next one

    def choose(self, running: list[Request], now: float) -> Entry | None:
        """Who may be let in now, if anybody; `entered` is told when it was."""
        self._went_ahead_last = None
        self._now = now
        account = self._queue.least()
        if account is None or account.head().in_flight:
            return None
        head = account.head()
        first = self._entry(head)
        if not self._fits(first, running) or self._reserved(account, first, running):
            return self._ahead_of(first, running)
        if self._cache.waits(head.table, head.tokens, now, self._latency):
            return self._ahead_of(first, running)
        if first.request is self._promised or self._queue.rules.window == 0:
            return first
        return self._best(first, running, now)

    def entered(self, request: Request) -> None:
        """It was let in."""
        self._put_back -= request.most_computed
        self._at_most += self._most_blocks(request)
        self._profile = self._together = None
        if request is self._went_ahead_last:
            self._went_ahead += self._ahead_cost
        if request is self._kept_for:
            self._kept_for = None
        if request is self._promised:
            self._promised = None

    def _best(self, first: Entry, running: list[Request], now: float) -> Entry:
        account = self._queue.account(first.request)
        limit = account.key + self._window(self._queue.rules.window)
        best, best_rank = first, self._rank(first.request, account, first.found, now)
        worth = max(1, -(-_LEAST_HIT // self._cache.block_tokens))
        may_find, some_fresh = self._cache.may_find, self._queue.has_fresh
        for looked, account in enumerate(self._queue.in_order()):
            if account.key > limit or looked >= _LOOK:
                break
            request = account.head()
            hits = may_find(request.table, request.tokens, worth)
            fresh = some_fresh and self._queue.is_fresh(account)
            if not (hits or fresh or request.deadline < math.inf):
                continue  # nothing to go first for
            if request is first.request or request in self._unfit or self._not_yet(request):
                continue
            found = self._cache.match(request.table, request.tokens) if hits else None
            rank = self._rank(request, account, found or [], now)
            # Among equals the smaller key is first, as they come.
            if rank > best_rank and self._may_enter(account, entry := self._entry(request, found), running):
                best, best_rank = entry, rank
        return best

    def _rank(
        self, request: Request, account: Account, found: list[BlockId], now: float
    ) -> tuple[bool, bool, float]:
        urgent = False
        if request.deadline < math.inf:
            left = len(request.tokens) + self._estimate.left(request)
            urgent = now + self._pace.expected(left) >= request.deadline
        # A few blocks, as of a template that all prompts begin with, are no reason to leave the order.
        hits = len(found) if len(found) * self._cache.block_tokens >= _LEAST_HIT else 0
        return urgent, self._queue.is_fresh(account), hits / len(request.tokens)

    def _ahead_of(self, first: Entry, running: list[Request]) -> Entry | None:
        """Somebody who fits where `first` does not, and does not delay it."""
        if first.request is not self._kept_for:
            self._kept_for, self._went_ahead = first.request, 0
        budget = self._window(self._queue.rules.backfill)
        if self._went_ahead >= budget:
            return None
        profile = self._profile or self._profile_of(running)
        limit = self._queue.account(first.request).key + self._window(self._queue.rules.window) + budget
        for looked, account in enumerate(self._queue.in_order()):
            if account.key > limit or looked >= _SCAN:
                return None
            request = account.head()
            if request is first.request or request in self._unfit or self._not_yet(request):
                continue
            entry = self._entry(request)
            cost = self._cost(entry, account)
            fits = self._may_enter(account, entry, running)
            if not fits or not profile.spares(self._cache.total, first.size, entry.size):
                self._unfit.add(request)
            elif self._went_ahead + cost <= budget:
                self._went_ahead_last, self._ahead_cost = request, cost
                return entry
        return None

    def _not_yet(self, request: Request) -> bool:
        """Its last draw is not back yet, or what it has loaded."""
        return bool(request.in_flight) or self._cache.loads.waits(request.table, self._now, self._latency)

    @property
    def _latency(self) -> float:
        """Seconds until the engine sees a message: it may be in a step, and has the next one already. Nobody
        could enter sooner, so waiting that long costs nothing."""
        return 2 * self._pace.longest_step

    def _cost(self, entry: Entry, account: Account) -> int:
        outputs = max(1, min(self._queue.predicted(account), entry.left))
        found = len(entry.found) * self._cache.block_tokens
        return self._queue.rules.prices.expected(entry.request, found, outputs)

    def _window(self, seconds: float) -> int:
        """A time as a difference of keys: what the engine does in it, of a tenant of weight 1."""
        return round(seconds * self._queue.rate)

    # ---- what fits

    def _entry(self, request: Request, found: list[BlockId] | None = None) -> Entry:
        """`found`: in the cache, if that is known."""
        if found is None:
            found = self._cache.match(request.table, request.tokens)
        own = -(-len(request.tokens) // self._cache.block_tokens) - len(found)
        return Entry(request, found, own, self._cache.idle(found), self._estimate.left(request))

    def _may_enter(self, account: Account, entry: Entry, running: list[Request]) -> bool:
        if not self._fits(entry, running) or self._over_share(account, entry):
            return False
        return not self._reserved(account, entry, running)

    def _fits(self, entry: Entry, running: list[Request]) -> bool:
        """What runs, as it is predicted to grow, leaves room for it. Alone it fits: admission saw to that."""
        if not running:
            return True
        if len(running) >= self._slots:
            return False
        return self._has_room(entry, running, self._cache.total) or self._fits_now(entry)

    def _fits_now(self, entry: Entry) -> bool:
        """Whether there is room for all of it at this moment, and it is of one who has no backlog and stays
        within its plain share: that others may grow into that room later is no reason to keep it out."""
        account = self._queue.account(entry.request)
        if not self._queue.is_fresh(account):
            return False
        size = entry.own + entry.idle + -(-entry.left // self._cache.block_tokens)
        share = self._queue.share_active(account)
        held = sum(self._final_blocks(r) for r in account.running)
        return size <= self._cache.available and held + size <= share * self._cache.total

    def _has_room(self, entry: Entry, running: list[Request], blocks: int) -> bool:
        """Whether no more than so many blocks will be held at once if it enters. In a roomy pool it makes no
        difference who ends when, and in a large one not even how long they get."""
        # (Moves hold blocks as well, those between tiers.)
        if not self._cache.tiered and self._at_most + self._most_blocks(entry.request) <= blocks:
            return True
        size = self._cache.block_tokens
        if self._together is None:
            self._together, runs = self._shared_and_runs(running)
            for own, left in runs:
                self._together += own - left // -size
        if self._together + entry.own + entry.idle - entry.left // -size <= blocks:
            return True
        if self._profile is None:
            self._profile = self._profile_of(running)
        return self._profile.peak_with(entry.own, entry.left) + entry.idle <= blocks

    def _most_blocks(self, request: Request) -> int:
        """One more than it may come to hold: what it has and what it will draw are rounded up apart."""
        return 1 - (request.n_prompt + request.sampling.max_tokens) // -self._cache.block_tokens

    def _profile_of(self, running: list[Request]) -> Profile:
        return Profile(*self._shared_and_runs(running), self._cache.block_tokens)

    def _shared_and_runs(self, running: list[Request]) -> tuple[int, list[tuple[int, int]]]:
        """As Profile takes them."""
        known, size, left = self._runs, self._cache.block_tokens, self._estimate.left
        shared = self._cache.used
        runs = []
        for r in running:
            run = known.get(r)
            if run is None:
                table = r.table
                held = len(table.blocks)
                own, whole = held - table.hits, -(-r.total // size)
                run = known[r] = own, (own + whole - held if whole > held else own, left(r))
            shared -= run[0]
            runs.append(run[1])
        return shared, runs

    def _over_share(self, account: Account, entry: Entry) -> bool:
        """Whether, while others wait, it would take more of the pool than its share times the setting.

        A tenant with nothing running never does, and the one with the least key is not asked: what is owed to
        it is service, which a limit on its blocks would withhold.
        """
        share = self._queue.share_waiting(account)
        if self._surplus <= 0 or share >= 1 or not account.running:
            return False
        held = sum(self._final_blocks(r) for r in account.running)
        return held + self._final_size(entry) > self._surplus * share * self._cache.total

    def _reserved(self, account: Account, entry: Entry, running: list[Request]) -> bool:
        """Whether it would take of the room that is kept for those that are about but do not wait just now.

        It is what they had at once of late, and within the surplus of the others' shares. Who has less than
        its plain share may; so may who has nothing running. While more than one tenant asks one slot is for
        these and for who has no backlog: one that floods would hold all of them, and whoever was away for
        long would wait for one to end.
        """
        if self._slot_is_kept(account, running):
            return True
        reserve = min(1 - 1 / self._surplus, self._queue.absent) if self._surplus > 1 else 0.0
        slots, tokens = self._queue.kept
        slots = min(slots, int(reserve * self._slots))
        blocks = min(-(-tokens // self._cache.block_tokens), int(reserve * self._cache.total))
        if not (slots or blocks) or not account.running:
            return False
        share = self._queue.share_active(account)
        full = len(running) + 1 > self._slots - slots
        if full and len(account.running) + 1 > share * self._slots:
            return True
        if self._has_room(entry, running, self._cache.total - blocks):
            return False
        held = sum(self._final_blocks(r) for r in account.running)
        return held + self._final_size(entry) > share * self._cache.total

    def _slot_is_kept(self, account: Account, running: list[Request]) -> bool:
        """Whether only the newcomers' slot is left, and it is none."""
        if self._slots < _NEWCOMERS_SLOT or len(running) + 1 < self._slots or not account.running:
            return False
        return self._queue.expects_others and not self._queue.is_fresh(account)

    def _final_size(self, entry: Entry) -> int:
        return entry.own + entry.left // self._cache.block_tokens

    def _final_blocks(self, request: Request) -> int:
        blocks = len(request.table.blocks) + self._cache.missing(request.table, request.total)
        return blocks - request.table.hits + self._estimate.left(request) // self._cache.block_tokens

    # ---- who makes room

    def victims(self, running: list[Request]) -> list[Request]:
        """Those that have to make room for the tenant that is owed most, if any: for one request in a
        step."""
        gap = self._window(self._queue.rules.preempt)
        least = self._queue.least()
        if gap <= 0 or least is None or not running:
            return []
        limit = least.key + gap
        over = {account: key for account in self._queue.running if (key := account.key) > limit}
        if not over or least.head().in_flight:
            return []
        allowed = _RECOMPUTED_SHARE * self._counters.computed_tokens
        allowed -= self._counters.recomputed_tokens + self._put_back
        if allowed <= 0:
            return []
        entry = self._entry(least.head())
        if self._fits(entry, running) and not self._slot_is_kept(least, running):
            return []
        movable = [r for account in over for r in account.running if r.preempted < MOST_PREEMPTIONS]
        # Of the most served first, and of these who has computed least: that is least to compute again.
        movable.sort(key=lambda r: (-over[self._queue.account(r)], r.computed, r.rank))
        chosen = self._enough(movable, entry, running)
        if not chosen or sum(r.most_computed for r in chosen) > allowed:
            return []
        self._promised = entry.request
        return chosen

    def _enough(self, movable: list[Request], entry: Entry, running: list[Request]) -> list[Request]:
        """The first whose room is enough for it; else the fewest from the beginning on whose room together
        is."""
        for request in movable[:_LOOK]:
            if self._makes_room([request], entry, running):
                return [request]
        several = range(len(movable) + 1)
        at = bisect.bisect_left(several, True, key=lambda n: self._makes_room(movable[:n], entry, running))
        return movable[:at] if at < len(several) else []

    def _makes_room(self, victims: list[Request], entry: Entry, running: list[Request]) -> bool:
        gone = set(victims)
        rest = [r for r in running if r not in gone]
        if not rest:
            return True
        # Blocks that only they hold: `_profile_of` the others counts them as shared.
        freed = sum(len(r.table.blocks) - r.table.hits for r in victims)
        peak = self._profile_of(rest).peak_with(entry.own, entry.left) + entry.idle
        return peak - freed <= self._cache.total
