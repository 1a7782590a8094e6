"""One request, from Submit to its terminal event."""

import math
from dataclasses import dataclass

from ktransformers.engine.protocol import Sampling
from ktransformers.kvcache.blocks import BlockTable
from ktransformers.scheduler.protocol import Tenant


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """What the scheduler knows of a request. `tokens` only grows; the three counts say how far its KV is.

        done <= computed <= total        (all are lengths of a beginning of the sequence)

        done        KV is in the cache: the step is done
        computed    KV will be in the cache once all planned steps are done
        total       to be computed, once all planned draws have given their tokens

    A step takes some of `total - computed`; whenever computed reaches total, a token is drawn. That is all
    there is to prefill, chunks, decoding, prefix hits and resuming after a preemption.
    """

    id: str
    peer: bytes
    """The front end that submitted it."""
    tenant: Tenant
    tokens: list[int]
    """The prompt and the output tokens that have come back."""
    n_prompt: int
    sampling: Sampling
    scope: bytes
    """Who may share its KV (Submit.cache_scope)."""
    table: BlockTable
    order: int
    """By arrival."""
    submitted: float
    deadline: float = math.inf
    """On the monotonic clock, as `submitted`."""

    slot: int = -1
    """In the engine; -1: waiting."""
    done: int = 0
    computed: int = 0
    total: int = 0
    drawn: int = 0
    """Output tokens that there will be once all planned draws are done."""
    in_flight: int = 0
    """Planned steps with a part of this request that are not done."""
    most_computed: int = 0
    """The furthest that `computed` has been: what is computed below it is computed again."""

    rank: int = 0
    """By first admission: who came later makes room for who came before."""
    preempted: int = 0
    """Times that it had to make room."""
    cost: int = 0
    """Micro-units that its computed tokens cost; see charges.py."""
    charged: int = 0
    """Micro-units that were charged: `cost`, or the least that a request costs."""
    charged_until: int = 0
    """Prompt tokens that are in `cost`."""
    pending: int = 0
    """Micro-units that are still expected of it, while it runs."""

    finished: bool = False
    """The engine has stopped it: what is planned for it is not done."""
    ended: bool = False
    """The terminal event is out."""
    emitted: int = 0
    """Output tokens given to the front end."""
    entered: bool = False
    """It has been in a slot."""
    queue_seconds: float = 0.0
    """From its submission to the planning of its first step."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix index at the first admission."""
    requeues: int = 0
    """Engine deaths that sent it back to the queue."""
    last_crash: int = -1
    """Number of the last engine death at which it was in a slot."""

    @property
    def remaining(self) -> int:
        """Tokens that the next steps have to compute before the next draw."""
        return self.total - self.computed

    def enter(self, slot: int, hit_tokens: int) -> None:
        """Take a slot, with the KV of the first `hit_tokens` tokens found."""
        self.slot = slot
        self.done = self.computed = hit_tokens
        self.total = len(self.tokens)
        self.drawn = self.total - self.n_prompt

    def plan(self, n: int) -> bool:
        """The next `n` tokens are computed in the step being planned; True when that draws a token."""
        self.computed = computed = self.computed + n
        self.in_flight += 1
        if computed > self.most_computed:
            self.most_computed = computed
        if computed < self.total:
            return False
        self.drawn += 1
        # The KV of the last token that may be drawn is never needed.
        if self.drawn < self.sampling.max_tokens:
            self.total += 1
        return True

    def leave(self) -> None:
        """Give up the slot."""
        self.slot = -1
        self.done = self.computed = 0
