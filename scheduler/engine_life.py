"""One life of the engine, from Ready to its end: its blocks, its slots, and what is under way.

Two steps are in flight: the engine computes n while n + 1 lies in its socket, so that neither the round trip
nor the planning shows in the time of a token. Who has no backlog and comes then would wait for both. Where
the engine takes urgent steps, its prompt is computed in the middle of step n; elsewhere, while such a one is
about, step n + 1 is planned as late as can be.
"""

import math
from collections import deque
from collections.abc import Callable

from ktransformers.engine.protocol import Ready, Step, slots_for
from ktransformers.kvcache.blocks import BlockTable
from ktransformers.kvcache.manager import KVCache
from ktransformers.scheduler.admission import Limits
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.growth import OutputEstimate
from ktransformers.scheduler.planner import Plan, Planner
from ktransformers.scheduler.protocol import Tenant
from ktransformers.scheduler.stats import Counters, Pace
from ktransformers.scheduler.step_time import Chunking, StepTime
from ktransformers.scheduler.watchdog import Watchdog

IN_FLIGHT = 2
PLAN_SECONDS, PLAN_SHARE = 0.003, 0.1
"""How long before its predicted end, at least and as a part of it, a step is followed by a plan of the next
one, when that is put off."""


class EngineLife:
    """It is kept when it ends, for its limits, until the next one begins."""

    def __init__(
        self,
        ready: Ready,
        config: SchedulerConfig,
        queue: FairQueue,
        estimate: OutputEstimate,
        counters: Counters,
        pace: Pace,
    ) -> None:
        self.alive = True
        self.ready = ready
        self._queue = queue
        self.limits = Limits(min(ready.max_len, ready.blocks * ready.block_tokens), ready.vocab)
        self.step_time = StepTime()
        self.cache = KVCache(
            ready.blocks,
            ready.block_tokens,
            ready.fingerprint,
            config.engine.cache.prefix_reuse,
            block_bytes=ready.block_bytes,
            host_blocks=ready.host_blocks,
            disk_bytes=ready.disk_bytes,
            kept_states=ready.kept_states,
            recompute=self.step_time.prompt_seconds,
        )
        self.watchdog = Watchdog(pace, self.cache.moves.oldest_sent)
        slots = ready.max_sequences
        self._chunking = Chunking(self.step_time, config.tbt_slo, interruptible=ready.urgent_tokens > 0)
        entrance = Entrance(self.cache, queue, estimate, counters, pace, slots)
        self.planner = Planner(
            self.cache,
            queue,
            entrance,
            self.step_time,
            self._chunking,
            estimate,
            counters,
            slots_for(slots, ready.urgent_tokens),
            slots,
            ready.max_batch_tokens,
        )
        self.plan_at: float | None = None
        """When to plan the next step, if that was put off."""
        self._in_flight: deque[Plan] = deque()
        self._urgent: Plan | None = None
        """In the middle of the oldest of them, or before or after it."""
        self._longest_pause = self._chunking.longest_pause
        self._pause_left = self._longest_pause
        """Seconds that the oldest of them may still be interrupted for."""
        self._began = 0.0
        """When the engine began with the oldest, as far as is known."""

    @property
    def in_hand(self) -> int:
        """Tokens of the step that the engine should be working on; 0: there is none."""
        plan = self._in_flight[0] if self._in_flight else self._urgent
        # A step may have no tokens and only let slots go; it has to be done all the same.
        return max(plan.tokens, 1) if plan is not None else 0

    def plan(self, now: float, send: Callable[[Step], None]) -> None:
        """Plan what can be planned.

        Nothing is while an urgent step is under way: it was planned for the steps that were in flight then,
        and a later one may have to do with anything that it uses.
        """
        self.plan_at = None
        while self._urgent is None and len(self._in_flight) < IN_FLIGHT:
            if not self._in_flight:
                plan = self.planner.plan(now)
            elif self._send_urgent(now, send):
                return
            elif (at := self._next_plan_at()) > now:
                self.plan_at = at
                return
            else:
                plan = self.planner.plan(now)
            if plan is None:
                return
            if not self._in_flight:
                self.watchdog.moved(now)
                self._began = now
            self._in_flight.append(plan)
            send(plan.step)
        if self._urgent is None:
            self._send_urgent(now, send)

    def _send_urgent(self, now: float, send: Callable[[Step], None]) -> bool:
        """A step for those without a backlog, if there are such and it is worth its while."""
        if not self._queue.has_fresh:
            return False
        most, left = self.ready.urgent_tokens, self._pause_left
        if not most or left <= 0:
            return False
        if not self.planner.is_long(self._in_flight[0].features):
            return False
        leaving = {slot for plan in self._in_flight for slot in plan.step.gone}
        plan = self.planner.plan_urgent(now, most, left, leaving)
        if plan is None:
            return False
        self._urgent = plan
        self._pause_left -= self.step_time.predict(plan.features)
        send(plan.step)
        return True

    def _next_plan_at(self) -> float:
        """The later, the more of those that ask seldom find a place in the next step. The engine waits if it
        is done before its time, so this is done only where there is somebody to gain from it."""
        if self.ready.urgent_tokens or not (self._queue.hurry and self.step_time.warm):
            return -math.inf
        seconds = self.step_time.predict(self._in_flight[0].features)
        return self._began + seconds - max(PLAN_SECONDS, PLAN_SHARE * seconds)

    def done(self, n: int, now: float) -> Plan | None:
        """The plan of step `n`, which is done; None when it was not the next one."""
        if self._urgent is not None and self._urgent.step.n == n:
            plan, self._urgent = self._urgent, None
        elif self._in_flight and self._in_flight[0].step.n == n:
            plan = self._in_flight.popleft()
            self._pause_left = self._longest_pause
            self._began = now
        else:
            return None
        under_way = [*self._in_flight, *([self._urgent] if self._urgent is not None else [])]
        oldest = min((plan.step.n for plan in under_way), default=self.planner.steps + 1)
        self.cache.step_done(oldest - 1)
        self.watchdog.moved(now)
        return plan

    def end(self) -> None:
        """What is in flight is never done."""
        self.alive = False
        self._in_flight.clear()
        self._urgent = None

    def open_table(self, scope: bytes, tenant: Tenant) -> BlockTable:
        """An empty one for a request of this tenant."""
        return self.cache.open(scope, self.cache.owner(tenant.id, tenant.weight, tenant.kv_bytes))
