"""The production scheduler against an engine that is only a formula: hours of load in minutes.

Nothing of the scheduler is replaced. The engine does Steps in a time that is linear in what they hold (see
step_time.py), the clients are arrivals (workload.py), and the clock is a number. The same seed gives the
same trace, byte for byte (`Result.digest`).
"""

import hashlib
import heapq
import random
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.protocol import (
    Moved,
    Moves,
    MovesDone,
    NewSeq,
    Ready,
    SlotToken,
    Step,
    StepDone,
    ToEngine,
)
from ktransformers.kvcache.config import CacheConfig
from ktransformers.scheduler.charges import UNIT, Prices
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import (
    Failed,
    FromScheduler,
    Hello,
    Sampling,
    Status,
    Submit,
    Tenant,
    TokenEvent,
    Tokens,
)
from ktransformers.scheduler.rules import Rules
from ktransformers.scheduler.scheduler import Scheduler
from ktransformers.scheduler.workload import Arrival, again

Policy = Literal["fair", "vtc", "fifo"]
POLICIES: tuple[Policy, ...] = ("fifo", "vtc", "fair")
VOCAB = 1 << 30
_PEER = b"simulator"


@dataclass(frozen=True)
class Machine:
    """An engine's size, and seconds: a step, a prompt token, a decode, a token of context, and of a prompt
    token's context. The defaults are about a small model on two CPU cores."""

    blocks: int = 1024
    block_tokens: int = 16
    slots: int = 32
    max_batch_tokens: int = 512
    max_len: int = 4096
    step: float = 0.004
    prompt: float = 0.001
    decode: float = 0.002
    context: float = 5e-7
    prompt_context: float = 2e-8
    urgent_tokens: int = 256
    """See Ready."""
    host_blocks: int = 0
    move: float = 0.0002
    """Seconds that a block takes from one tier to another; one at a time, beside the steps."""
    noise: float = 0.05
    """Each step's time is off by so much, as a standard deviation."""

    def ready(self) -> Ready:
        """What such an engine says of itself."""
        return Ready(
            pid=1,
            blocks=self.blocks,
            block_tokens=self.block_tokens,
            block_bytes=1,
            max_len=self.max_len,
            max_sequences=self.slots,
            max_batch_tokens=self.max_batch_tokens,
            vocab=VOCAB,
            isa="simulated",
            steps=0,
            fingerprint=b"simulated",
            urgent_tokens=self.urgent_tokens,
            host_blocks=self.host_blocks,
        )


@dataclass
class _Slot:
    computed: int
    length: int
    drawn: int
    output: int
    """It stops after so many tokens; carried by the seed, which nothing else here needs."""
    most: int
    live: bool = True


class ModelledEngine:
    """Does Steps as the engine would, but for the numbers."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self._machine = machine
        self._rng = random.Random(f"engine {seed}")
        self._slots: dict[int, _Slot] = {}

    def step(self, step: Step) -> StepDone:
        """Its outcome; `seconds` is how long it takes."""
        for slot in step.gone:
            del self._slots[slot]
        for new in step.new:
            self._slots[new.slot] = self._slot(new)
        m = self._machine
        seconds = m.step if step.go_on else 0.0
        drawn: list[SlotToken] = []
        computed = 0
        for go in step.go_on:
            held = self._slots[go.slot]
            if not held.live:
                continue
            start, n = held.computed, go.n_tokens
            held.computed += n
            computed += n
            if n > 1:
                seconds += n * (m.prompt + m.prompt_context * (start + n / 2))
            else:
                seconds += m.decode + m.context * start
            if held.computed == held.length:
                drawn.append(self._draw(go.slot, held))
        seconds *= max(0.1, self._rng.gauss(1.0, m.noise))
        return StepDone(step.n, drawn, seconds, computed)

    def _slot(self, new: NewSeq) -> _Slot:
        drawn = len(new.tokens) - new.n_prompt
        return _Slot(new.computed, len(new.tokens), drawn, new.sampling.seed, new.sampling.max_tokens)

    def _draw(self, number: int, slot: _Slot) -> SlotToken:
        slot.drawn += 1
        slot.length += 1
        finish = ""
        if slot.drawn >= slot.output:
            finish = "stop"
        elif slot.drawn >= slot.most:
            finish = "length"
        slot.live = not finish
        return SlotToken(number, slot.drawn, finish)


@dataclass
class TenantResult:
    """What one tenant got."""

    weight: float = 1.0
    asked: int = 0
    done: int = 0
    refused: int = 0
    late: int = 0
    """Not done within their deadlines."""
    service: float = 0.0
    """Units; an input token that is computed is 1."""
    ttft: "array[float]" = field(default_factory=lambda: array("d"))
    itl: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds between tokens."""


@dataclass
class Result:
    """A simulated run."""

    policy: Policy
    seconds: float
    tenants: dict[str, TenantResult]
    status: Status
    samples: list[tuple[float, dict[str, float]]]
    """Service of each tenant by then."""
    digest: str
    """Of all steps and events."""

    def jain(self, names: Iterable[str] | None = None) -> float:
        """Jain's index of service by weight: 1 is even, 1/n is one has all."""
        chosen = self.tenants if names is None else names
        shares = [self.tenants[name].service / self.tenants[name].weight for name in chosen]
        squares = sum(s * s for s in shares)
        return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which that share of them lies; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class _Open:
    arrival: Arrival
    submitted: float
    last_token: float = -1.0


class Simulation:
    """One run. Also the scheduler's world (scheduler.Ports)."""

    def __init__(
        self,
        arrivals: Iterable[Arrival],
        policy: Policy = "fair",
        machine: Machine | None = None,
        seed: int = 0,
        settings: dict[str, object] | None = None,
    ) -> None:
        """`settings`: fields of SchedulerConfig."""
        machine = machine or Machine()
        engine = EngineConfig(model="simulated", cache=CacheConfig())
        values = {"max_waiting": 1 << 20, **(settings or {})}
        config = msgspec.convert({**values, "policy": policy, "engine": engine}, SchedulerConfig)
        self.now = 0.0
        self.policy: Policy = policy
        self.scheduler = Scheduler(config, self, self.now)
        self.tenants: dict[str, TenantResult] = {}
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._prices: Prices = Rules.of(config).prices
        self._machine = machine
        self._engine = ModelledEngine(machine, seed)
        self._seed = seed
        self._arrivals = iter(arrivals)
        self._next: Arrival | None = next(self._arrivals, None)
        self._returns: list[tuple[float, int, Arrival]] = []
        self._steps: deque[Step] = deque()
        self._done: StepDone | None = None
        self._urgent_done: StepDone | None = None
        self._done_at = self._urgent_done_at = self._ticked = 0.0
        self._moved: deque[tuple[float, MovesDone]] = deque()
        self._open: dict[str, _Open] = {}
        self._submitted = self._returned = 0
        self._prefixes: dict[tuple[str, int], list[int]] = {}
        self._hash = hashlib.sha256()
        self.scheduler.front(_PEER, Hello(), self.now)
        self.scheduler.engine(machine.ready(), self.now)

    # ---- scheduler.Ports

    def to_engine(self, message: ToEngine) -> None:
        """As Ports."""
        if isinstance(message, Step):
            self._hash.update(msgspec.msgpack.encode(message))
            if message.urgent:
                self._interrupt(message)
            else:
                self._steps.append(message)
        elif isinstance(message, Moves):
            self._hash.update(msgspec.msgpack.encode(message))
            for move in message.moves:
                begin = max(self.now, self._moved[-1][0] if self._moved else 0.0)
                moved = Moved(move.id, True, 1, self._machine.move)
                self._moved.append((begin + self._machine.move, MovesDone([moved], [])))

    def _interrupt(self, step: Step) -> None:
        """Do it in the middle of the step in hand, which takes so much longer."""
        self._urgent_done = self._engine.step(step)
        self._done_at += self._urgent_done.seconds
        self._urgent_done_at = self.now + self._urgent_done.seconds

    def to_front(self, peer: bytes, message: FromScheduler) -> bool:
        """As Ports."""
        if isinstance(message, Tokens):
            self._hash.update(msgspec.msgpack.encode(message))
            for event in message.events:
                self._event(event)
        elif isinstance(message, Failed):
            self._hash.update(msgspec.msgpack.encode(message))
            self._failed(message)
        return True

    def signal_engine(self, pid: int, signum: int) -> None:
        """As Ports; a formula does not hang."""
        raise RuntimeError("the scheduler gives the simulated engine up")

    # ---- time

    def run(self, seconds: float, sample: float = 0.0) -> Result:
        """Until so many seconds have gone by or all is done; service is noted each `sample` seconds."""
        sampled = self.now
        while self.now < seconds and self.move(seconds):
            if sample and self.now - sampled >= sample:
                sampled = self.now
                self.samples.append((self.now, {name: t.service for name, t in self.tenants.items()}))
        status = self.scheduler.status()
        return Result(self.policy, self.now, self.tenants, status, self.samples, self._hash.hexdigest())

    def move(self, until: float = float("inf")) -> bool:
        """Go to the next thing that happens; False when nothing will."""
        if self._done is None and self._steps:
            self._done = self._engine.step(self._steps.popleft())
            begin = self.now if self._urgent_done is None else self._urgent_done_at
            self._done_at = begin + self._done.seconds
        times = [self._done_at] if self._done is not None else []
        if self._urgent_done is not None:
            times.append(self._urgent_done_at)
        if (wake_at := self.scheduler.wake_at(self.now)) is not None:
            times.append(wake_at)
        if self._next is not None:
            times.append(self._next.seconds)
        if self._returns:
            times.append(self._returns[0][0])
        if self._moved:
            times.append(self._moved[0][0])
        if not times:
            return False
        at = min(times)
        # A gap in the arrivals is passed in seconds: the scheduler has its ticks.
        self.now = max(self.now, min(at, self.now + 1.0, until))
        if self.now - self._ticked >= 1.0:
            self._ticked = self.now
            self.scheduler.front(_PEER, Hello(), self.now)
            self.scheduler.tick(self.now)
        while self._next is not None and self._next.seconds <= self.now:
            arrival, self._next = self._next, next(self._arrivals, None)
            self._submit(arrival)
        while self._returns and self._returns[0][0] <= self.now:
            self._submit(heapq.heappop(self._returns)[2])
        while self._moved and self._moved[0][0] <= self.now:
            self.scheduler.engine(self._moved.popleft()[1], self.now)
        if self._done is not None and self._done_at <= self.now:
            done, self._done = self._done, None
            self.scheduler.engine(done, self.now)
        if self._urgent_done is not None and self._urgent_done_at <= self.now:
            done, self._urgent_done = self._urgent_done, None
            self.scheduler.engine(done, self.now)
        self.scheduler.advance(self.now)
        return True

    # ---- clients

    def _submit(self, arrival: Arrival) -> None:
        self._submitted += 1
        request_id = f"r{self._submitted}"
        result = self.tenants.setdefault(arrival.tenant, TenantResult(weight=arrival.weight))
        result.asked += 1
        self._open[request_id] = _Open(arrival, self.now)
        sampling = Sampling(max_tokens=max(arrival.max_tokens, arrival.output), seed=arrival.output)
        tenant = Tenant(arrival.tenant, user=arrival.user, weight=arrival.weight)
        scope = arrival.tenant.encode()[:64]
        tokens = self._prompt(arrival)
        submit = Submit(request_id, tenant, tokens, sampling, arrival.deadline, scope)
        self.scheduler.front(_PEER, submit, self.now)

    def _prompt(self, arrival: Arrival) -> list[int]:
        """A beginning in common and a rest that no other has."""
        common = self._prefixes.get((arrival.tenant, arrival.topic), [])
        if len(common) < arrival.prefix:
            name = len(self._prefixes) + 1
            common = [name] * arrival.prefix
            self._prefixes[arrival.tenant, arrival.topic] = common
        own = VOCAB // 2 + self._submitted
        return common[: arrival.prefix] + [own] * max(1, arrival.prompt - arrival.prefix)

    def _event(self, event: TokenEvent) -> None:
        request = self._open[event.id]
        result = self.tenants[request.arrival.tenant]
        if event.tokens and request.last_token < 0:
            result.ttft.append(self.now - request.submitted)
            prompt = max(request.arrival.prompt, request.arrival.prefix + 1)
            hits = event.cached_tokens
            result.service += (self._prices.prompt * (prompt - hits) + self._prices.cached * hits) / UNIT
        elif event.tokens:
            result.itl.append(self.now - request.last_token)
        if event.tokens:
            request.last_token = self.now
            result.service += self._prices.output * len(event.tokens) / UNIT
        if event.finish:
            result.done += event.finish != "cancelled"
            self._end(event.id)

    def _failed(self, failed: Failed) -> None:
        result = self.tenants[self._open[failed.id].arrival.tenant]
        if failed.code == "deadline":
            result.late += 1
        else:
            result.refused += 1
        self._end(failed.id, 1.0)

    def _end(self, request_id: str, pause: float = 0.0) -> None:
        arrival = self._open.pop(request_id).arrival
        if arrival.again:
            n = self.tenants[arrival.tenant].asked
            following = again(arrival, self.now + pause, self._seed, n)
            self._returned += 1
            heapq.heappush(self._returns, (following.seconds, self._returned, following))
