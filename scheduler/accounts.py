"""What the fair queue knows of a tenant and its users, as long as they have something open or a debt."""

from collections import OrderedDict, deque

from ktransformers.scheduler.protocol import Tenant
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.virtual_time import Claimant, Level

RECENT_OUTPUTS = 5
_MOST_IDLE_USERS = 64


class User(Claimant):
    """A user of a tenant, and what it has waiting."""

    __slots__ = ("open", "unsettled", "unsettled_promise", "waiting")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.open = 0
        """Requests that wait or run."""
        self.unsettled = self.unsettled_promise = 0
        """Micro-units charged that are not in the order yet, and what had been promised of them."""

    def head(self) -> Request:
        """Its next request. Something waits."""
        return next(iter(self.waiting.values()))


class Account(Claimant):
    """A tenant: its users, its limits, and what it has running."""

    __slots__ = (
        "backlogged_service",
        "due",
        "due_from",
        "first",
        "kept",
        "largest",
        "light",
        "limited",
        "most_running",
        "most_tokens",
        "outputs",
        "running",
        "service",
        "terms",
        "users",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, terms: Tenant, by_arrival: bool) -> None:
        super().__init__(terms.id)
        self.terms = terms
        self.users: Level[User] = Level(_MOST_IDLE_USERS, by_arrival)
        self.running: dict[Request, None] = {}
        self.waiting = 0
        self.waiting_tokens = 0
        self.first: Request | None = None
        """Its next request, once it was asked for."""
        self.limited = False
        """Something waits, but as many run as may."""
        self.service = 0
        """Micro-units charged since this record was made."""
        self.backlogged_service = 0
        """Of that, while it had something waiting."""
        self.due = 0.0
        """Its part by weight of what was charged meanwhile to all that had something waiting."""
        self.due_from = 0.0
        self.outputs: deque[int] = deque(maxlen=RECENT_OUTPUTS)
        self.most_running = 0
        self.most_tokens = 0
        """That it had at once of late, and the tokens of those requests."""
        self.largest = 0
        """Tokens of the largest one."""
        self.light = False
        """It has nothing waiting, and has had no more than its share: it may be back at any time."""
        self.kept = (0, 0)
        """Slots and tokens that are kept for it while it has nothing waiting."""

    @property
    def open(self) -> bool:
        """Something of it waits or runs."""
        return bool(self.waiting or self.running)

    def head(self) -> Request:
        """Its next request. Something waits."""
        if self.first is None:
            user = self.users.ready.least()
            if user is None:
                raise LookupError(f"tenant {self.name!r} has nothing waiting")
            self.first = user.head()
        return self.first
