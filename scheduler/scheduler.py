"""The scheduler: what the front ends and the engine say goes in, what is to be said to them comes out.

No I/O, and no clock but the `now` (monotonic, in seconds) of each call. After each batch of messages the
caller calls `advance`, which keeps the engine's steps planned ahead (`engine_life.py`).

Every Submit is answered by exactly one terminal event: a request is known from `_accept` to `_end`, which
alone sends one. Whatever happens to the engine, a known request either runs, or waits, or ends.
"""

import heapq
import logging
import math
import signal
from typing import Protocol

import msgspec

from ktransformers.engine.channel import Back, Lost
from ktransformers.engine.protocol import (
    Fault,
    FromEngine,
    Loading,
    MovesDone,
    Ready,
    StepDone,
    Stored,
    ToEngine,
)
from ktransformers.scheduler import tiers
from ktransformers.scheduler.admission import Refused, check, overloaded, rate_limited
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.engine_life import EngineLife
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.front_ends import FrontEnds
from ktransformers.scheduler.growth import OutputEstimate
from ktransformers.scheduler.outcome import Outcomes
from ktransformers.scheduler.protocol import (
    Cancel,
    Drain,
    Failed,
    FromScheduler,
    Hello,
    Status,
    Submit,
    TokenEvent,
    ToScheduler,
    Withdraw,
)
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.rules import Rules
from ktransformers.scheduler.stats import Counters, Pace

log = logging.getLogger(__name__)

AWAY_SECONDS = 60.0
"""An engine that has said nothing for so long is not coming back soon: who waits for it is told."""
ASLEEP_SECONDS = 2.0
"""Ticks come once a second; a longer gap means that this process itself stood still."""
REQUEUES = 2
_RETRY_SECONDS = 10.0
_TENANTS_TOLD = 32
_SHUTTING_DOWN = "the server is shutting down"
_STOOD_STILL = "the API process did not answer for too long"


class Ports(Protocol):
    """The world outside."""

    def to_engine(self, message: ToEngine) -> None:
        """Send it, or drop it when the engine is gone: Lost follows."""
        ...

    def to_front(self, peer: bytes, message: FromScheduler) -> bool:
        """Send it; False when that front end is gone."""
        ...

    def signal_engine(self, pid: int, signum: signal.Signals) -> None:
        """Send a signal to the engine process, if there is one."""
        ...


class Scheduler:
    """All requests of all front ends, and the one engine that serves them."""

    def __init__(self, config: SchedulerConfig, ports: Ports, now: float) -> None:
        self.counters = Counters()
        self.draining = False
        self._config = config
        self._ports = ports
        self._fronts = FrontEnds(ports.to_front)
        rules = Rules.of(config)
        self._queue = FairQueue(rules)
        self._estimate = OutputEstimate()
        self._pace = Pace()
        self._outcomes = Outcomes(
            rules.prices,
            self._queue,
            self._estimate,
            self.counters,
            self._pace,
            self._fronts.tell_event,
            self._end,
        )
        self._requests: dict[str, Request] = {}
        self._early: dict[str, tuple[bytes, Submit, float]] = {}
        """Submitted before the engine first said something: peer, message, time."""
        self._deadlines: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._engine: EngineLife | None = None
        self._engine_said_at = now
        self._engine_unheard = True
        self._detail = "waiting for the engine"
        self._ticked_at = now
        self._told_ready = False

    @property
    def open_requests(self) -> int:
        """Requests that have no terminal event yet."""
        return len(self._requests) + len(self._early)

    def advance(self, now: float) -> None:
        """Plan what can be planned, and send what is to be sent. After each batch of messages."""
        for peer in self._fronts.take_lost():
            self._lose_front(peer)
        self._expire(now)
        engine = self._engine
        if engine is not None and engine.alive and not engine.watchdog.condemned:
            engine.plan(now, self._ports.to_engine)
            if (moves := tiers.to_send(engine.cache, now)) is not None:
                self._ports.to_engine(moves)
        self._fronts.flush()
        if self._ready() is not self._told_ready:
            self._told_ready = not self._told_ready
            self._fronts.tell_all(self.status())

    def wake_at(self, now: float) -> float | None:
        """When to `advance` although nothing may have been said: a plan was put off, or a load will not be
        waited for any longer."""
        engine = self._engine
        if engine is None or not engine.alive:
            return None
        times = [at for at in (engine.plan_at, engine.cache.loads.next_timeout(now)) if at is not None]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """Once a second: what happens because nothing happens."""
        slept = now - self._ticked_at
        self._ticked_at = now
        engine = self._engine
        if slept > ASLEEP_SECONDS:
            self._fronts.slept(slept)
            if engine is not None:
                engine.watchdog.slept(slept)
        for peer in self._fronts.take_silent(now):
            self._lose_front(peer)
        if engine is not None and engine.alive:
            if (due := engine.watchdog.check(now, engine.in_hand)) is not None:
                log.error("the engine hangs: %s; %s", due.name, self.status())
                self._ports.signal_engine(engine.ready.pid, due)
        elif now - self._engine_said_at > AWAY_SECONDS:
            self._give_up_waiting()

    def check(self) -> None:
        """Errors: AssertionError when blocks, slots or requests are not conserved."""
        engine = self._engine
        waiting = list(self._queue)
        running = engine.planner.running if engine is not None and engine.alive else []
        here = waiting + running
        if len(here) != len(self._requests) or {r.id for r in here} != set(self._requests):
            raise AssertionError("a request neither runs nor waits, or does both")
        self._queue.check()
        if engine is not None and engine.alive:
            engine.planner.check()

    def status(self) -> Status:
        """As of now."""
        engine, c = self._engine, self.counters
        cache = engine.cache if engine is not None and engine.alive else None
        return Status(
            ready=self._ready(),
            detail="" if self._ready() else self._detail,
            draining=self.draining,
            max_len=engine.limits.max_len if engine else 0,
            vocab=engine.limits.vocab if engine else 0,
            isa=engine.ready.isa if engine else "",
            waiting=len(self._queue) + len(self._early),
            running=len(self._requests) - len(self._queue),
            blocks_total=engine.ready.blocks if engine else 0,
            blocks_used=cache.used if cache else 0,
            blocks_cached=cache.cached if cache else 0,
            steps=c.steps,
            step_seconds=c.step_seconds,
            computed_tokens=c.computed_tokens,
            recomputed_tokens=c.recomputed_tokens,
            generated_tokens=c.generated_tokens,
            prefix_hit_tokens=c.prefix_hit_tokens,
            prefix_query_tokens=c.prefix_query_tokens,
            preemptions=c.preemptions,
            engine_restarts=c.engine_restarts,
            tiers=tiers.status(cache) if cache else [],
            load_waits=cache.loads.waited if cache else 0,
            load_timeouts=cache.loads.timed_out if cache else 0,
            tenants=[
                msgspec.structs.replace(tenant, kv_bytes=cache.bytes_of(tenant.id)) if cache else tenant
                for tenant in self._queue.status(_TENANTS_TOLD)
            ],
        )

    def _ready(self) -> bool:
        engine = self._engine
        return engine is not None and engine.alive and not engine.watchdog.condemned

    # ---- front ends

    def front(self, peer: bytes, message: ToScheduler, now: float) -> None:
        """A front end says something."""
        self._fronts.heard(peer, now)
        match message:
            case Hello():
                self._fronts.tell(peer, self.status())
            case Submit():
                self._submit(peer, message, now)
            case Cancel():
                self._cancel(message.id)
            case Drain():
                self.drain()
            case Withdraw() if self._engine is not None and self._engine.alive:
                self._engine.cache.withdraw(message.tokens)

    def drain(self) -> None:
        """Refuse what comes from now on."""
        self.draining = True
        self._fronts.tell_all(self.status())

    def shut_down(self) -> None:
        """End all requests that are open."""
        for request in list(self._requests.values()):
            self._fail(request, "draining", _SHUTTING_DOWN)
        for request_id in list(self._early):
            self._end_early(request_id, Failed(request_id, "draining", _SHUTTING_DOWN, _RETRY_SECONDS))
        self._fronts.flush()

    def _submit(self, peer: bytes, submit: Submit, now: float) -> None:
        # A front end that lost its connection submits again: nobody hears what we say to the old one.
        if (old := self._requests.get(submit.id)) is not None:
            self._forget(old)
        engine = self._engine
        expected = now - self._engine_said_at <= AWAY_SECONDS
        if self.draining:
            self._fronts.tell(peer, Failed(submit.id, "draining", _SHUTTING_DOWN, _RETRY_SECONDS))
        elif engine is not None and (engine.alive or expected):
            self._accept(peer, submit, now, engine)
        elif self._engine_unheard and expected and len(self._early) < self._config.max_waiting:
            # We were just started; perhaps the engine was not, and is about to tell us its limits.
            self._early[submit.id] = (peer, submit, now)
        else:
            self._fronts.tell(peer, self._not_ready(submit.id))

    def _not_ready(self, request_id: str) -> Failed:
        return Failed(request_id, "not_ready", f"the model is not ready: {self._detail}", _RETRY_SECONDS)

    def _accept(self, peer: bytes, submit: Submit, submitted: float, engine: EngineLife) -> None:
        try:
            sampling = check(submit, engine.limits)
        except Refused as refused:
            self._fronts.tell(peer, Failed(submit.id, refused.code, refused.message))
            return
        if (refusal := self._refusal(submit)) is not None:
            self._fronts.tell(peer, refusal)
            return
        self._arrivals += 1
        request = Request(
            id=submit.id,
            peer=peer,
            tenant=submit.tenant,
            tokens=submit.tokens,
            n_prompt=len(submit.tokens),
            sampling=sampling,
            scope=submit.cache_scope,
            table=engine.open_table(submit.cache_scope, submit.tenant),
            order=self._arrivals,
            submitted=submitted,
            deadline=submitted + submit.deadline if submit.deadline > 0 else math.inf,
        )
        self._requests[request.id] = request
        self._queue.push(request)
        engine.cache.prefetch(request.table, request.tokens)
        if submit.deadline > 0:
            # Most end long before their deadline: do not keep them for its sake.
            if len(self._deadlines) > 2 * len(self._requests) + 64:
                self._deadlines = [entry for entry in self._deadlines if not entry[2].ended]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.order, request))

    def _refusal(self, submit: Submit) -> Failed | None:
        """Why it may not wait, if so. One of a tenant with a longer queue may have to make room for it."""
        drain = self._pace.expected(self._queue.tokens + len(submit.tokens))
        if self._queue.over_limit(submit.tenant, len(submit.tokens)):
            return rate_limited(submit.id, drain)
        if 0 < submit.deadline < self._queue.wait_seconds(submit.tenant):
            return overloaded(submit.id, drain)
        while self._is_full(len(submit.tokens)):
            if (shed := self._queue.to_shed(submit.tenant)) is None:
                return overloaded(submit.id, drain)
            self._end(shed, overloaded(shed.id, drain))
        return None

    def _is_full(self, tokens: int) -> bool:
        # A prompt that is too long for an empty queue would never be let in.
        too_long = self._queue.tokens + tokens > self._config.max_waiting_tokens and len(self._queue) > 0
        return too_long or len(self._queue) >= self._config.max_waiting

    def _cancel(self, request_id: str) -> None:
        cancelled = TokenEvent(request_id, [], [], finish="cancelled")
        if (request := self._requests.get(request_id)) is not None:
            self._end(request, cancelled)
        elif request_id in self._early:
            self._end_early(request_id, cancelled)

    def _lose_front(self, peer: bytes) -> None:
        orphans = [r for r in self._requests.values() if r.peer == peer]
        early = [i for i, (of, _, _) in self._early.items() if of == peer]
        if orphans or early:
            log.warning("a front end is gone: %d requests are cancelled", len(orphans) + len(early))
        # It may only have stood still, and its clients wait for an end: say it, whether or not it is heard.
        for request in orphans:
            self._fail(request, "internal", _STOOD_STILL)
        for request_id in early:
            self._end_early(request_id, Failed(request_id, "internal", _STOOD_STILL))

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            if not request.ended:
                self._fail(request, "deadline", "the request was not done within its deadline")

    # ---- the end of a request

    def _end(self, request: Request, last: TokenEvent | Failed) -> None:
        """Forget the request and say so, this once."""
        trusted = not isinstance(last, Failed) or last.code != "numerical_error"
        self._forget(request, trusted=trusted)
        self._fronts.tell(request.peer, last)

    def _fail(self, request: Request, code: str, message: str) -> None:
        self._end(request, Failed(request.id, code, message))

    def _end_early(self, request_id: str, last: TokenEvent | Failed) -> None:
        peer, _, _ = self._early.pop(request_id)
        self._fronts.tell(peer, last)

    def _forget(self, request: Request, *, trusted: bool = True) -> None:
        request.ended = True
        del self._requests[request.id]
        if request.slot < 0:
            self._queue.remove(request)
            if self._engine is not None:
                self._engine.planner.gone(request)
        if self._engine is not None and self._engine.alive:
            self._engine.planner.end(request, trusted=trusted)

    # ---- the engine

    def engine(self, message: FromEngine | Lost | Back, now: float) -> None:
        """The engine says something."""
        if isinstance(message, Lost):
            self._lose_engine()
            return
        if isinstance(message, Back):
            return
        self._engine_said_at = now
        self._engine_unheard = False
        match message:
            case Loading():
                share = message.done / message.total if message.total > 0 else 0.0
                self._detail = f"loading {share:.0%}"
            case Ready():
                self._take_ready(message, now)
            case StepDone():
                self._take_step(message, now)
            case MovesDone() if self._engine is not None and self._engine.alive:
                tiers.take_moved(self._engine.cache, message.moves, message.lost)
            case Stored() if self._engine is not None and self._engine.alive:
                tiers.take_stored(self._engine.cache, message)
            case Fault():
                log.error("the engine reports %s in step %d: %s", message.kind, message.n, message.message)
                if message.n >= 0:
                    self._condemn(f"step {message.n} failed", now)
                else:
                    self._detail = f"the engine reports {message.kind}"

    def _take_ready(self, ready: Ready, now: float) -> None:
        if self._engine is not None and self._engine.alive:
            if self._engine.ready.pid == ready.pid:
                if not ready.disk_bytes:
                    self._engine.cache.lose_disk()
                return  # the heartbeat
            self._lose_engine()
        self._engine = engine = EngineLife(
            ready, self._config, self._queue, self._estimate, self.counters, self._pace
        )
        for request in self._queue:
            request.table = engine.open_table(request.scope, request.tenant)
        early, self._early = self._early, {}
        for peer, submit, submitted in early.values():
            self._accept(peer, submit, submitted, engine)
        # The first time the server's own announcement follows.
        level = logging.INFO if self.counters.engine_restarts else logging.DEBUG
        log.log(level, "the engine is ready: %d blocks of %d tokens", ready.blocks, ready.block_tokens)

    def _take_step(self, done: StepDone, now: float) -> None:
        engine = self._engine
        plan = engine.done(done.n, now) if engine is not None else None
        if engine is None or plan is None:
            self._condemn(f"step {done.n} was not the next one", now)
            return
        for slot in self._outcomes.take(engine, plan, done):
            self._condemn(f"slot {slot} drew no token", now)

    def _condemn(self, why: str, now: float) -> None:
        """The engine and we disagree about what was done: only a new one puts that right."""
        log.error("the engine is given up: %s", why)
        if self._engine is not None and self._engine.alive:
            self._engine.watchdog.condemn(now)
            self._detail = "engine restarting"

    def _lose_engine(self) -> None:
        engine = self._engine
        self._detail = "engine restarting"
        if engine is None or not engine.alive:
            return
        engine.end()
        self.counters.engine_restarts += 1
        victims = list(engine.planner.running)
        for request in reversed(victims):
            request.leave()
            self._queue.leave(request)
            self._queue.push_front(request)
        for request in self._queue:
            request.in_flight = request.most_computed = 0
        for request in victims:
            self._survive(request, self.counters.engine_restarts)

    def _survive(self, request: Request, crash: int) -> None:
        """The engine died, for the crash-th time, with this request in a slot: it waits again, or ends."""
        consecutive = request.last_crash == crash - 1
        request.last_crash = crash
        request.requeues += 1
        if request.emitted:
            self._fail(request, "engine_restarted", "the engine was restarted during the answer")
        elif consecutive:
            shape = f"{request.n_prompt} prompt tokens, max_tokens {request.sampling.max_tokens}"
            log.error("quarantined: a request was there at two engine deaths in a row (%s)", shape)
            self._fail(request, "internal", "quarantined")
        elif request.requeues > REQUEUES:
            self._fail(request, "engine_restarted", "the engine was restarted too often")

    def _give_up_waiting(self) -> None:
        for request in list(self._requests.values()):
            self._end(request, self._not_ready(request.id))
        for request_id in list(self._early):
            self._end_early(request_id, self._not_ready(request_id))
