"""Scheduler and engine in one thread, without sockets: what the tests of law 1 run."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.moves import BlockMoves
from ktransformers.engine.protocol import Moves, Ready, Sampling, Step, StepDone, ToEngine
from ktransformers.engine.runner import Limits, Runner
from ktransformers.engine.service import stored
from ktransformers.kvcache.config import CacheConfig
from ktransformers.kvcache.manager import KVCache
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.memory import HostBlocks
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.protocol import Failed, FromScheduler, Hello, Submit, Tenant, TokenEvent, Tokens
from ktransformers.scheduler.scheduler import Scheduler

SLOTS = 64
BLOCKS = 512


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    finish: str = ""


class Stack:
    """Scheduler and engine, two steps deep as in production; the mover has its own threads."""

    def __init__(
        self,
        executor: NativeExecutor,
        *,
        chunk: int,
        blocks: int = BLOCKS,
        reuse: bool = True,
        host_blocks: int = 0,
        disk: DiskStore | None = None,
        vocab: int = 49152,
        urgent: bool = False,
    ) -> None:
        """`urgent`: steps are interrupted, where `between` has submitted something."""
        self.woken = threading.Semaphore(0)
        host = HostBlocks(host_blocks, executor.block_bytes) if host_blocks else None
        self.moves = BlockMoves(executor, host, disk, self.woken.release)
        # An executor with states has one for each slot; the others are for copies.
        kept = executor.state_slots - SLOTS if executor.state_slots else -1
        limits = Limits(blocks, executor.block_tokens, 2048, SLOTS, chunk, vocab, kept)
        self.runner = Runner(executor, limits, self.moves.arriving)
        self.runner.between = self._between if urgent else None
        self.between: Callable[[], None] = lambda: None
        self.urgent: Step | None = None
        self.urgent_steps = 0
        config = SchedulerConfig(engine=EngineConfig(model="", cache=CacheConfig(prefix_reuse=reuse)))
        self.steps: deque[Step] = deque()
        self.answers: dict[str, Answer] = {}
        self.now = 0.0
        self.scheduler = Scheduler(config, self, self.now)
        ready = Ready(
            pid=1,
            blocks=blocks,
            block_tokens=executor.block_tokens,
            block_bytes=executor.block_bytes,
            max_len=limits.max_len,
            max_sequences=SLOTS,
            max_batch_tokens=chunk,
            vocab=limits.vocab,
            isa=executor.isa,
            steps=0,
            fingerprint=b"f",
            host_blocks=host_blocks,
            disk_bytes=disk.stats().cap if disk is not None else 0,
            kept_states=kept,
            urgent_tokens=executor.urgent_tokens if urgent else 0,
        )
        self.scheduler.engine(ready, self.now)
        for piece in stored(disk) if disk is not None else ():
            self.scheduler.engine(piece, self.now)

    def to_engine(self, message: ToEngine) -> None:
        if isinstance(message, Moves):
            self.moves.start(message)
            return
        assert isinstance(message, Step)
        if message.urgent:
            self.urgent = message
        else:
            self.steps.append(message)

    def _between(self) -> None:
        self.between()
        self._do_urgent()

    def _do_urgent(self) -> bool:
        if self.urgent is None:
            return False
        step, self.urgent = self.urgent, None
        self.urgent_steps += 1
        done = self.runner.step(step)
        assert isinstance(done, StepDone), done
        self.scheduler.engine(done, self.now)
        self.scheduler.advance(self.now)
        self.scheduler.check()
        return True

    def to_front(self, peer: bytes, message: FromScheduler) -> bool:
        assert not isinstance(message, Failed), message
        if isinstance(message, Tokens):
            for event in message.events:
                self._take(event)
        return True

    def signal_engine(self, pid: int, signum: object) -> None:
        raise AssertionError("the scheduler gives the engine up")

    def _take(self, event: TokenEvent) -> None:
        answer = self.answers[event.id]
        assert not answer.finish, "news after the end"
        answer.tokens += event.tokens
        answer.logprobs += [(p.logprob, tuple(p.top)) for p in event.logprobs]
        answer.finish = event.finish

    def submit(self, name: str, prompt: list[int], sampling: Sampling) -> None:
        self.answers[name] = Answer()
        submit = Submit(name, Tenant("t"), list(prompt), sampling, 0.0, b"scope")
        self.scheduler.front(b"front", submit, self.now)
        self.scheduler.advance(self.now)

    @property
    def cache(self) -> KVCache:
        """The scheduler's."""
        assert self.scheduler._engine is not None
        return self.scheduler._engine.cache

    def step(self) -> bool:
        """A step, or what copies have ended when there is none; False: there is nothing to do."""
        if self._do_urgent():
            return True
        if self.steps:
            done = self.runner.step(self.steps.popleft())
            assert isinstance(done, StepDone), done
            self.now += 0.01
            self.scheduler.front(b"front", Hello(), self.now)
            self.scheduler.engine(done, self.now)
        elif any(True for _ in self.cache.moves.under_way):
            assert self.woken.acquire(timeout=120)
        else:
            return False
        if (news := self.moves.news()) is not None:
            self.scheduler.engine(news, self.now)
        self.scheduler.advance(self.now)
        self.scheduler.check()
        return True

    def run(self) -> dict[str, Answer]:
        """Until all are answered, and all copies have ended."""
        while self.step():
            pass
        assert self.scheduler.open_requests == 0 and self.scheduler.status().blocks_used == 0
        return self.answers

    def expect_short_answers(self, n: int) -> None:
        """Let the scheduler see so many, and not be careful as at its start: it lets in more than fits, and
        what follows outgrows the pool."""
        for i in range(n):
            self.submit(f"short {i}", [i + 1], Sampling(temperature=0.0, max_tokens=1))
        self.run()
        self.answers.clear()
        self.scheduler._estimate.factor = 1.0

    def close(self) -> None:
        """End the mover's threads. The disk is the caller's."""
        self.moves.close(20)


Prompts = dict[str, tuple[list[int], Sampling]]


def check(answers: dict[str, Answer], alone: dict[str, Answer]) -> None:
    assert answers.keys() == alone.keys()
    for name, answer in answers.items():
        assert answer == alone[name], name  # floats compared by ==: the same bits
