"""A scheduler with a fake engine and fake front ends, moved by hand: no sockets, no threads, no clock."""

from collections import deque

import step_engine

from ktransformers.engine.channel import Lost
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.protocol import Moves, Sampling, Step
from ktransformers.kvcache.config import CacheConfig
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import Cancel, Failed, Hello, Status, Submit, Tenant, Tokens
from ktransformers.scheduler.scheduler import Scheduler

PEER = b"front"


class World:
    def __init__(self, reuse=True, every_step=True, start=True, settings=None, **ready):
        engine = EngineConfig(model="none", cache=CacheConfig(prefix_reuse=reuse))
        config = SchedulerConfig(engine=engine, **(settings or {}))
        self.now = 1000.0
        self.scheduler = Scheduler(config, self, self.now)
        self.ready = step_engine.ready(**ready)
        self.every_step = every_step
        self.engine = None
        self.disk = {}
        """Outlives an engine."""
        self.to_do: deque[Step] = deque()
        self.urgent: Step | None = None
        self.urgent_steps = 0
        self.signals = []
        self.gone_peers = set()
        self.statuses = []
        self.submits: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.first: dict[str, object] = {}
        self.ends: dict[str, str] = {}
        self.failures: dict[str, Failed] = {}
        self.ended_in_order: list[str] = []
        if start:
            self.start_engine()

    # ---- scheduler.Ports

    def to_engine(self, message):
        if self.engine is None:
            return
        if isinstance(message, Moves):
            self.engine.mover.take(message)
        elif message.urgent:
            assert self.urgent is None
            self.urgent = message
            self.urgent_steps += 1
        else:
            assert self.urgent is None, "a step is planned while an urgent one is under way"
            self.to_do.append(message)
            assert len(self.to_do) <= 2

    def to_front(self, peer, message):
        if peer in self.gone_peers:
            return False
        if isinstance(message, Tokens):
            assert len({e.id for e in message.events}) == len(message.events)
            for event in message.events:
                assert event.id not in self.ends, "news after the end"
                if event.id not in self.first:
                    self.first[event.id] = event
                self.tokens[event.id] += event.tokens
                if event.finish:
                    self._end(event.id, event.finish)
        elif isinstance(message, Failed):
            assert message.id not in self.ends, "two ends"
            self.failures[message.id] = message
            self._end(message.id, message.code)
        elif isinstance(message, Status):
            self.statuses.append(message)
        return True

    def signal_engine(self, pid, signum):
        self.signals.append((pid, signum))

    def _end(self, id_, how):
        self.ends[id_] = how
        self.ended_in_order.append(id_)
        submit = self.submits[id_]
        if how in ("stop", "length"):
            room = min(self.ready.max_len, self.ready.blocks * self.ready.block_tokens) - len(submit.tokens)
            assert (self.tokens[id_], how) == step_engine.answer(submit.tokens, submit.sampling, room), id_

    # ---- moves

    def start_engine(self):
        self.engine = step_engine.FakeEngine(self.ready, self.every_step)
        self.engine.mover.disk = self.disk
        self.scheduler.engine(self.ready, self.now)
        if self.ready.disk_bytes:
            self.scheduler.engine(self.engine.mover.stored(), self.now)
        self.advance()

    def kill_engine(self):
        self.engine = None
        self.to_do.clear()
        self.urgent = None
        self.scheduler.engine(Lost(), self.now)
        self.advance()

    def submit(self, id_, prompt, peer=PEER, deadline=0.0, scope=b"", advance=True, **sampling):
        sampling.setdefault("max_tokens", 8)
        submit = Submit(id_, Tenant("tenant"), list(prompt), Sampling(**sampling), deadline, scope)
        # The scheduler may keep and extend the list.
        self.submits[id_] = Submit(id_, Tenant("tenant"), list(prompt), submit.sampling, deadline, scope)
        self.tokens[id_] = []
        self.scheduler.front(peer, submit, self.now)
        if advance:
            self.advance()

    def cancel(self, id_, peer=PEER):
        self.scheduler.front(peer, Cancel(id_), self.now)
        self.advance()

    def hello(self, peer=PEER):
        self.scheduler.front(peer, Hello(), self.now)

    def engine_step(self, urgent_late=False):
        """The engine does the urgent step, or else the oldest; False when it has none."""
        if self.urgent is not None and not (urgent_late and self.to_do):
            step, self.urgent = self.urgent, None
        elif self.to_do:
            step = self.to_do.popleft()
        else:
            return False
        done = self.engine.step(step)
        self.now += 0.01
        self.hello()
        self.scheduler.engine(done, self.now)
        self.advance()
        return True

    def finish_move(self, at=0, fails=False):
        """The engine ends one of its moves; False when it has none."""
        if self.engine is None or not self.engine.mover.under_way:
            return False
        self.now += 0.0001
        at %= len(self.engine.mover.under_way)
        self.scheduler.engine(self.engine.mover.finish(at, fails), self.now)
        self.advance()
        return True

    def settle(self, most=100_000):
        """All moves and all steps are done, moves first."""
        for _ in range(most):
            if not self.finish_move() and not self.engine_step() and not self.wake():
                return
        raise AssertionError("the work never ends")

    def wake(self):
        """Time passes until the scheduler wants to be woken; False when it does not."""
        at = self.scheduler.wake_at(self.now)
        if at is None:
            return False
        self.now = max(at, self.now)
        self.advance()
        return True

    def wait(self, seconds):
        """Seconds pass without news from the engine."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.hello()
            self.scheduler.tick(self.now)
            self.advance()

    def run(self, most=100_000):
        for _ in range(most):
            if not self.engine_step() and not self.wake():
                return
        raise AssertionError("the work never ends")

    def advance(self):
        self.scheduler.advance(self.now)
        self.scheduler.check()

    @property
    def status(self):
        return self.scheduler.status()

    def check_drained(self):
        """Nothing is left of anything."""
        assert set(self.ends) == set(self.submits)
        assert self.scheduler.open_requests == 0
        status = self.status
        assert (status.waiting, status.running, status.blocks_used) == (0, 0, 0)
        assert self.scheduler._engine.cache.tiers.states.written == 0
