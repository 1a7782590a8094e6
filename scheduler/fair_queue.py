"""Who waits, and in which order they are let in: W-VTC-P, weighted virtual counters with prediction.

Two levels by one rule (`virtual_time.py`): tenants by weight, and within a tenant its users alike; a user's
own requests are first come, first served. `entrance.py` asks who is next and knows what fits; charges come
back as they were executed. No I/O and no clock: the caller says what time it is.

A tenant at its own limit of running requests does not count as waiting: if it did, its small key would hold
V* back and newcomers would start with credit.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator

from ktransformers.scheduler.accounts import RECENT_OUTPUTS, Account, User
from ktransformers.scheduler.charges import UNIT
from ktransformers.scheduler.protocol import Tenant, TenantStatus
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.reserve import Reserve
from ktransformers.scheduler.rules import Rules
from ktransformers.scheduler.virtual_time import Level

_RATE_DECAY = 0.99
"""A step; the rate is that of the last hundred or so."""
_LINGER_SECONDS = 10.0
"""Who was here so lately is expected back: some room is kept for it."""
_FRESH_SECONDS = 2.0
"""After so long it waits as the others do."""
_LIGHT_SECONDS = 0.25
"""Of its own share: who has had no more than that beyond what it was due is light."""
_BEFORE_ALL = 1 << 62
_MOST_LINGERING = 1024
_MOST_IDLE_TENANTS = 16_384


class FairQueue:
    """All waiting requests, and the account of every tenant that has something open or is in debt."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.tokens = 0
        """Prompt tokens that wait."""
        self._tenants: Level[Account] = Level(_MOST_IDLE_TENANTS, rules.by_arrival)
        self.running: dict[Account, None] = {}
        """Accounts with something that runs."""
        self._waiting: dict[Request, None] = {}
        self._whose: dict[Request, tuple[Account, User]] = {}
        """Of all that wait or run."""
        self._charged: dict[User, Account] = {}
        """Those with something `unsettled`."""
        self._lingering: OrderedDict[Account, float] = OrderedDict()
        self._fresh: OrderedDict[Account, float] = OrderedDict()
        """Light ones that had nothing waiting until lately, and since when they have."""
        self._active = 0
        """Tenants that have something here, or had it lately."""
        self._reserve = Reserve()
        self._due = 0.0
        """What a tenant of weight 1 was due until now, had it always had something waiting."""
        self._milli_waiting = 0
        self._milli_active = 0
        self._with_waiting: dict[Account, None] = {}
        self._outputs: deque[int] = deque(maxlen=RECENT_OUTPUTS)
        self._cost = 0.0
        self._seconds = 0.0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        """All that wait, by arrival within each tenant's user."""
        return iter(list(self._waiting))

    # ---- requests come and go

    def push(self, request: Request) -> None:
        """A new request."""
        account, user = self._open(request)
        user.waiting[request.id] = request
        self._waits(request, account, user)

    def push_front(self, request: Request) -> None:
        """A request that had been let in and is put back for no fault of its own: the next of its user's."""
        account, user = self._open(request)
        user.waiting[request.id] = request
        user.waiting.move_to_end(request.id, last=False)
        self._waits(request, account, user)

    def _waits(self, request: Request, account: Account, user: User) -> None:
        self._whose[request] = account, user
        if not account.waiting:
            self._tenants.lift(account)
            self._milli_waiting += account.milli
            self._with_waiting[account] = None
            account.due_from = self._due
            if self.rules.fresh_first and self._is_light(account):
                self._fresh[account] = self._now
        if len(user.waiting) == 1:
            account.users.lift(user)
        user.open += 1
        account.waiting += 1
        account.waiting_tokens += request.n_prompt
        self.tokens += request.n_prompt
        self._waiting[request] = None
        self._place_user(account, user)
        account.users.advance()
        self._place(account)
        self._tenants.advance()

    def remove(self, request: Request) -> None:
        """It has ended while it waited. Errors: KeyError when it does not wait."""
        account, user = self._take(request)
        self._close(request, account, user)

    def enter(self, request: Request, found: int) -> None:
        """It is let in, with `found` tokens of its prompt in the cache. Errors: as `remove`."""
        account, user = self._take(request)
        account.running[request] = None
        self.running[account] = None
        self._reserve.entered(account, request, self.predicted(account))
        if self.rules.predict:
            outputs = max(1, min(self.predicted(account), request.sampling.max_tokens) - request.drawn)
            request.pending = self.rules.prices.expected(request, found, outputs)
            self._promise(account, user, request.pending)
            self._place_user(account, user)
        self._place(account)

    def leave(self, request: Request) -> None:
        """It gave up its slot, for good or to be pushed to the front again."""
        self._settle()
        account, user = self._whose[request]
        del account.running[request]
        if not account.running:
            del self.running[account]
        self._promise(account, user, -request.pending)
        self._place_user(account, user)
        request.pending = 0
        self._close(request, account, user)

    def ended(self, request: Request) -> None:
        """A running request has ended by itself: what its tenant's next ones are predicted from."""
        account, _ = self._whose[request]
        account.outputs.append(request.drawn)
        self._outputs.append(request.drawn)

    def predicted(self, account: Account) -> int:
        """Output tokens of a request of this tenant. A wrong one costs order for a while, never a share."""
        outputs = account.outputs or self._outputs
        return sum(outputs) // len(outputs) if outputs else 1

    def _take(self, request: Request) -> tuple[Account, User]:
        self._settle()
        del self._waiting[request]
        account, user = self._whose[request]
        # What was next until now is what this user's and this tenant's place had been worth.
        account.users.advance()
        self._tenants.advance()
        del user.waiting[request.id]
        self._place_user(account, user)
        account.waiting -= 1
        account.waiting_tokens -= request.n_prompt
        self.tokens -= request.n_prompt
        if not account.waiting:
            account.due = self._due_of(account)
            account.due_from = self._due
            self._milli_waiting -= account.milli
            del self._with_waiting[account]
            self._fresh.pop(account, None)
        return account, user

    def _close(self, request: Request, account: Account, user: User) -> None:
        del self._whose[request]
        user.open -= 1
        if not user.open:
            account.users.rest(user)
        self._place(account)
        if not account.waiting and not account.running:
            self._linger(account)

    def _place_user(self, account: Account, user: User) -> None:
        account.first = None
        if user.waiting:
            account.users.ready.put(user, user.head().order)
        else:
            account.users.ready.drop(user)

    def _place(self, account: Account) -> None:
        """Something about it has changed: it is among those that may be next, or not, with its key."""
        if account in self._fresh and not self._is_light(account):
            del self._fresh[account]
        at_limit = 0 < account.terms.max_running <= len(account.running)
        if account.waiting and not at_limit:
            if account.limited:
                # While it could not use more it was as good as idle.
                self._tenants.lift(account)
            # At the same key who has no backlog goes first.
            order = account.head().order - (_BEFORE_ALL if account in self._fresh else 0)
            self._tenants.ready.put(account, order)
        else:
            self._tenants.ready.drop(account)
        account.limited = bool(account.waiting) and at_limit
        if not account.waiting or account.light:
            self._keep(account)

    def _linger(self, account: Account) -> None:
        self._lingering[account] = self._now
        while len(self._lingering) > _MOST_LINGERING:
            self._part(next(iter(self._lingering)))

    def _part(self, account: Account) -> None:
        del self._lingering[account]
        self._active -= 1
        self._milli_active -= account.milli
        self._reserve.forget(account)
        self._tenants.rest(account)

    # ---- those that are about

    def _keep(self, account: Account) -> None:
        light = not account.waiting and account.largest > 0 and self._is_light(account)
        self._reserve.keep(account, light)

    @property
    def kept(self) -> tuple[int, int]:
        """Slots and tokens to keep for light tenants that are about and have nothing waiting."""
        return self._reserve.slots, self._reserve.tokens

    @property
    def expects_others(self) -> bool:
        """More than one tenant asks here: another may come at any time, however long it was away."""
        return self.rules.fresh_first and self._reserve.expects_others(self._now)

    @property
    def hurry(self) -> bool:
        """Beside others there is a light one that has no backlog: it should not wait for long steps."""
        if not self.rules.fresh_first or self._active < 2:
            return False
        return bool(self._fresh) or self._reserve.light > 0

    @property
    def has_fresh(self) -> bool:
        """Somebody waits who is light and has no backlog."""
        return bool(self._fresh)

    def is_fresh(self, account: Account) -> bool:
        """Whether it is light and has no backlog: it had nothing waiting until lately."""
        return account in self._fresh

    def _is_light(self, account: Account) -> bool:
        """It has had no more than its share, with what is promised to it; or nobody else waits."""
        least = self._tenants.ready.least()
        if least is None or least is account:
            return True
        ahead = account.key - self._tenants.time
        return ahead * max(self._milli_active, 1) <= _LIGHT_SECONDS * self.rate * 1000

    # ---- accounts

    def _open(self, request: Request) -> tuple[Account, User]:
        """The account and the user of a request that begins to wait."""
        self._settle()
        account, user = self._account(request)
        terms = request.tenant
        if self._lingering.pop(account, None) is None and not account.waiting and not account.running:
            self._active += 1
            self._milli_active += account.milli
        self._reserve.asks(account, self._now)
        if account.terms != terms or account.weight != terms.weight:
            self._agree(account, terms)
        return account, user

    def _account(self, request: Request) -> tuple[Account, User]:
        """Its account and user, made when they are not known: the forgotten, too, pay for what was done."""
        terms = request.tenant
        account = self._tenants.members.get(terms.id)
        if account is None:
            account = Account(terms, self.rules.by_arrival)
            account.weight = terms.weight
            self._tenants.add(account)
        user = account.users.members.get(terms.user)
        if user is None:
            user = User(terms.user)
            account.users.add(user)
        return account, user

    def _agree(self, account: Account, terms: Tenant) -> None:
        before = account.milli
        if account.waiting:
            account.due, account.due_from = self._due_of(account), self._due
        account.terms = terms
        account.weight = terms.weight
        self._milli_active += account.milli - before
        if account.waiting:
            self._milli_waiting += account.milli - before

    def _promise(self, account: Account, user: User, cost: int) -> None:
        account.pending += cost
        user.pending += cost

    # ---- what was done

    def charge(self, request: Request, cost: int) -> None:
        """So much, in micro-units, was done for a request. It may have ended meanwhile.

        All that is charged for a step is put in order at once, before anybody is asked for.
        """
        account, user = self._whose.get(request) or self._account(request)
        pending = request.pending
        settled = cost if cost < pending else pending
        request.pending = pending - settled
        self._charged[user] = account
        user.unsettled += cost
        user.unsettled_promise += settled

    def _settle(self) -> None:
        """Keys only grow by this, which the order finds out by itself, but for who is next of a tenant's
        users, and who is light."""
        if not self._charged:
            return
        charged, self._charged = self._charged, {}
        for user, account in charged.items():
            cost, kept_promise = user.unsettled, user.unsettled_promise
            user.unsettled = user.unsettled_promise = 0
            account.charge(cost)
            account.service += cost
            account.pending -= kept_promise
            user.charge(cost)
            user.pending -= kept_promise
            users = account.users
            if not user.open:
                users.rest(user)
            if account.waiting:
                account.backlogged_service += cost
                self._due += cost * 1000 / self._milli_waiting
                if len(users.members) > 1 and len(users.ready) > 1:
                    account.first = None
        fresh, lingering = self._fresh, self._lingering
        for account in dict.fromkeys(charged.values()):
            if account.waiting:
                if account.first is None or account in fresh:
                    self._place(account)
            elif account.running:
                if not account.light:
                    self._keep(account)
            elif account not in lingering:
                self._tenants.rest(account)

    def executed(self, cost: int, seconds: float) -> None:
        """A step was done for `cost` micro-units in all."""
        self._settle()
        if seconds > 0:
            self._cost = self._cost * _RATE_DECAY + cost
            self._seconds = self._seconds * _RATE_DECAY + seconds

    def step(self, now: float) -> None:
        """A step was planned."""
        self._settle()
        self._now = now
        self._tenants.advance()
        while self._fresh:
            account, since = next(iter(self._fresh.items()))
            if now - since < _FRESH_SECONDS:
                break
            del self._fresh[account]
            self._place(account)
        while self._lingering:
            account, since = next(iter(self._lingering.items()))
            if now - since < _LINGER_SECONDS:
                return
            self._part(account)

    @property
    def rate(self) -> float:
        """Micro-units that the engine does in a second; 0 while nothing was measured."""
        return self._cost / self._seconds if self._seconds else 0.0

    # ---- who is next

    def least(self) -> Account | None:
        """The account with the smallest key of those that may be next."""
        self._settle()
        return self._tenants.ready.least()

    def in_order(self) -> Iterator[Account]:
        """Those that may be next, by key. Nothing may change meanwhile."""
        return self._tenants.ready.in_order()

    def share_waiting(self, account: Account) -> float:
        """Its part of the weight of those that have something waiting, itself among them."""
        others = self._milli_waiting - (account.milli if account.waiting else 0)
        return account.milli / (account.milli + others)

    def share_active(self, account: Account) -> float:
        """Its part of the weight of those that are or were lately here."""
        return account.milli / max(account.milli, self._milli_active)

    @property
    def absent(self) -> float:
        """Part of the weight that is or was lately here of those that have nothing waiting now."""
        return 1 - self._milli_waiting / self._milli_active if self._milli_active else 0.0

    def prompt_order(self, request: Request) -> tuple[bool, int]:
        """Of running requests with a part of their prompt to come: tenants without a backlog first, then by
        key."""
        if not self.rules.fresh_first:
            return False, 0
        account, _ = self._whose[request]
        return account.waiting > 0 and account not in self._fresh, account.key

    def account(self, request: Request) -> Account:
        """Of a request that waits or runs."""
        return self._whose[request][0]

    # ---- limits of those that wait

    def over_limit(self, terms: Tenant, tokens: int) -> bool:
        """Whether one more request with so many prompt tokens would be over the tenant's own limits."""
        account = self._tenants.members.get(terms.id)
        if account is None or not account.waiting:
            return False
        too_many = 0 < terms.max_waiting <= account.waiting
        return too_many or 0 < terms.max_waiting_tokens < account.waiting_tokens + tokens

    def wait_seconds(self, terms: Tenant) -> float:
        """At least so long a new request of this tenant waits, by the prompts that it has waiting."""
        account = self._tenants.members.get(terms.id)
        if account is None or self.rate <= 0:
            return 0.0
        # Those that are found in the cache cost only this.
        cost = account.waiting_tokens * min(self.rules.prices.cached, self.rules.prices.prompt)
        return cost / self.rate / self.share_waiting(account)

    def to_shed(self, terms: Tenant) -> Request | None:
        """Who is to make room for a request of this tenant when the queue is full: the newest of the tenant
        whose queue is longest for its weight, of those that have one that has not begun; None when that would
        be the asking tenant itself."""
        if self.rules.by_arrival:
            return None
        asking = self._tenants.members.get(terms.id)
        mine = ((asking.waiting if asking else 0) + 1) / max(terms.weight, 1 / 1000)
        longer = [a for a in self._with_waiting if a.waiting / a.weight > mine and a is not asking]
        while longer:
            longest = max(longer, key=lambda a: a.waiting / a.weight)
            if (newest := _newest(longest)) is not None:
                return newest
            longer.remove(longest)
        return None

    # ---- for the operator

    def status(self, most: int) -> list[TenantStatus]:
        """The accounts with most service."""
        accounts = heapq.nsmallest(most, self._tenants.members.values(), key=lambda a: (-a.service, a.name))
        return [
            TenantStatus(
                a.name,
                a.weight,
                a.waiting,
                len(a.running),
                a.service / UNIT,
                a.backlogged_service / UNIT,
                self._due_of(a) / UNIT,
            )
            for a in accounts
        ]

    def _due_of(self, account: Account) -> float:
        since = self._due - account.due_from if account.waiting else 0.0
        return account.due + since * account.weight

    def check(self) -> None:
        """Errors: AssertionError when the counts do not agree with one another."""
        accounts = list(self._tenants.members.values())
        waiting = [r for a in accounts for u in a.users.members.values() for r in u.waiting.values()]
        pending = all(a.pending == sum(r.pending for r in a.running) for a in accounts)
        problems = {
            "waiting": set(waiting) != set(self._waiting) or sum(a.waiting for a in accounts) != len(waiting),
            "tokens": sum(r.n_prompt for r in waiting) != self.tokens,
            "pending": not pending,
            "debts": any(a.counter < 0 or a.pending < 0 for a in accounts),
            "active": self._active != sum(a in self._lingering or a.open for a in accounts),
            "fresh": any(not a.waiting for a in self._fresh),
            "light": self._reserve.light != sum(a.light for a in accounts),
            "kept": self.kept != (sum(a.kept[0] for a in accounts), sum(a.kept[1] for a in accounts)),
        }
        if wrong := [name for name, bad in problems.items() if bad]:
            raise AssertionError(f"the fair queue is out of order: {', '.join(wrong)}")


def _newest(account: Account) -> Request | None:
    """Of its user who waits with most, of those whose newest has not begun: that is not taken back."""
    found, most = None, 0
    for user in account.users.members.values():
        if len(user.waiting) > most:
            newest = next(reversed(user.waiting.values()))
            if not newest.entered:
                found, most = newest, len(user.waiting)
    return found
