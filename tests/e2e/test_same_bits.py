"""Law 1: a request's tokens and log-probabilities are the same bits, whoever runs beside it.

The production scheduler, runner and native executor with the default model, without sockets: 50 prompts,
greedy and sampled, are answered alone, and then all together in every way that the scheduler has of running
them.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.protocol import Ready, Sampling, Step, StepDone, ToEngine
from ktransformers.engine.runner import Limits, Runner
from ktransformers.kvcache.config import CacheConfig
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
    """Scheduler and engine in one thread, two steps deep as in production."""

    def __init__(
        self, executor: NativeExecutor, *, chunk: int, blocks: int = BLOCKS, reuse: bool = True
    ) -> None:
        limits = Limits(blocks, executor.block_tokens, 2048, SLOTS, chunk, 49152)
        self.runner = Runner(executor, limits)
        config = SchedulerConfig(engine=EngineConfig(model="", cache=CacheConfig(prefix_reuse=reuse)))
        self.steps: deque[Step] = deque()
        self.answers: dict[str, Answer] = {}
        self.now = 0.0
        self.scheduler = Scheduler(config, self, self.now)
        self.scheduler.engine(
            Ready(
                1,
                blocks,
                executor.block_tokens,
                1,
                limits.max_len,
                SLOTS,
                chunk,
                limits.vocab,
                executor.isa,
                0,
                b"f",
            ),
            self.now,
        )

    def to_engine(self, message: ToEngine) -> None:
        assert isinstance(message, Step)
        self.steps.append(message)

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

    def step(self) -> bool:
        if not self.steps:
            return False
        done = self.runner.step(self.steps.popleft())
        assert isinstance(done, StepDone), done
        self.now += 0.01
        self.scheduler.front(b"front", Hello(), self.now)
        self.scheduler.engine(done, self.now)
        self.scheduler.advance(self.now)
        self.scheduler.check()
        return True

    def run(self) -> dict[str, Answer]:
        while self.step():
            pass
        assert self.scheduler.open_requests == 0 and self.scheduler.status().blocks_used == 0
        return self.answers


Prompts = dict[str, tuple[list[int], Sampling]]


@pytest.fixture(scope="module")
def prompts(default_tokenizer) -> Prompts:
    """50 prompts of 1 to 300 tokens, some with a long common beginning; half of them sampled in all ways."""
    rng = random.Random(7)
    common = default_tokenizer.encode(
        "You are the keeper of a lighthouse and answer each question with a story. " * 5
    )
    words = [
        "sea",
        "storm",
        "lamp",
        "ship",
        "night",
        "gull",
        "rock",
        "letter",
        "captain",
        "fog",
        "bell",
        "keeper",
        "rope",
    ]
    found: Prompts = {}
    for i in range(50):
        text = " ".join(rng.choice(words) for _ in range(rng.choice((1, 5, 30, 120, 250))))
        tokens = (common if i % 3 == 0 else []) + default_tokenizer.encode(text)
        if i % 2:
            sampling = Sampling(
                temperature=rng.choice((0.5, 1.0, 1.5)),
                top_k=rng.choice((0, 5, 40)),
                top_p=rng.choice((1.0, 0.9)),
                min_p=rng.choice((0.0, 0.05)),
                repetition_penalty=rng.choice((1.0, 1.2)),
                presence_penalty=rng.choice((0.0, 0.5)),
                seed=rng.randrange(2**63),
                max_tokens=rng.choice((1, 6, 12, 60)),
                logprobs=3,
            )
        else:
            sampling = Sampling(temperature=0.0, max_tokens=rng.choice((1, 6, 12, 60)), logprobs=2)
        found[f"r{i}"] = (tokens, sampling)
    return found


@pytest.fixture(scope="module")
def alone(native_executor, prompts: Prompts) -> dict[str, Answer]:
    """Each prompt on a stack that never saw another, its whole prompt in one step."""
    answers = {}
    for name, (tokens, sampling) in prompts.items():
        stack = Stack(native_executor, chunk=512, reuse=False)
        stack.submit(name, tokens, sampling)
        answers |= stack.run()
    assert sum(len(a.tokens) for a in answers.values()) > 300
    return answers


def check(answers: dict[str, Answer], alone: dict[str, Answer]) -> None:
    assert answers.keys() == alone.keys()
    for name, answer in answers.items():
        assert answer == alone[name], name  # floats compared by ==: the same bits


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("reuse", [False, True])
def test_all_together(
    native_executor, prompts: Prompts, alone: dict[str, Answer], chunk: int, reuse: bool
) -> None:
    stack = Stack(native_executor, chunk=chunk, reuse=reuse)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)


@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals(native_executor, prompts: Prompts, alone: dict[str, Answer], seed: int) -> None:
    rng = random.Random(seed)
    stack = Stack(native_executor, chunk=64)
    order = list(prompts)
    rng.shuffle(order)
    for name in order:
        stack.submit(name, *prompts[name])
        for _ in range(rng.randrange(6)):
            stack.step()
    check(stack.run(), alone)


def test_prefix_hits(native_executor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    """Twice on one stack: the second time every full block of every prompt is found in the cache."""
    stack = Stack(native_executor, chunk=512, blocks=BLOCKS)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    before = stack.scheduler.status().prefix_hit_tokens
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
        stack.run()
    check(stack.answers, alone)
    hits = stack.scheduler.status().prefix_hit_tokens - before
    assert hits >= 0.5 * sum(len(tokens) for tokens, _ in prompts.values())


def test_forced_preemption(native_executor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    """Many short answers make the scheduler expect more of them; those that follow outgrow the pool."""
    stack = Stack(native_executor, chunk=512, blocks=40)
    for i in range(200):
        stack.submit(f"short {i}", [i + 1], Sampling(temperature=0.0, max_tokens=1))
    stack.run()
    stack.answers.clear()
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    assert stack.scheduler.status().preemptions > 0
