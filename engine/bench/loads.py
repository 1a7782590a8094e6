"""What is timed: prompts and decoding streams on an executor alone, with no process around it."""

import time
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ktransformers.engine.batch import Batch, SamplingBatch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.build import Progress, build_executor
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.plan import block_bytes, plan
from ktransformers.kvcache.config import CacheConfig

STEP_TOKENS: Final = 512
STREAMS: Final = 64
_ROUND: Final = 64
"""Steps after which decoding goes back to where it began, so that the context stays what it says."""
_LEAST_STEPS: Final = 4

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Load:
    """One row of a benchmark."""

    kind: Literal["prefill", "decode"]
    tokens: int = 0
    """prefill: of the prompt, computed from nothing in steps of STEP_TOKENS."""
    streams: int = 1
    """decode: sequences that get one token in each step."""
    context: int = 0
    """decode: tokens that each of them has already."""

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens}"
        return f"decode {self.streams} at {self.context}"


LOADS: Final = (
    Load("prefill", tokens=512),
    Load("prefill", tokens=4096),
    Load("decode", streams=1, context=128),
    Load("decode", streams=8, context=128),
    Load("decode", streams=16, context=128),
    Load("decode", streams=32, context=128),
    Load("decode", streams=1, context=4096),
)


class Bench:
    """A model on the native executor, as much of it as a benchmark needs.

    Errors: OSError, GgufError, ModelError (of which CannotFit) when it cannot be loaded.
    """

    def __init__(self, model: str, threads: int, loads: tuple[Load, ...], progress: Progress) -> None:
        longest = max(max(load.tokens, load.streams * (load.context + _ROUND)) for load in loads)
        blocks = -(-longest // NativeExecutor.block_tokens) + STREAMS
        config = EngineConfig(
            model=model, threads=threads, max_batch_tokens=STEP_TOKENS, max_sequences=STREAMS, context=16
        )
        self.program, self.facts = open_model(config)
        cache = CacheConfig(device_bytes=blocks * block_bytes(config, self.program))
        config = msgspec.structs.replace(config, cache=cache)
        executor = build_executor(config, self.program, plan(config, self.program, self.facts), progress)
        if not isinstance(executor, NativeExecutor):
            raise TypeError("the native executor is what is measured")
        self.executor = executor
        self._filled: Load | None = None

    def fits(self, load: Load) -> bool:
        """Whether the model was trained for sequences of this length."""
        return max(load.tokens, load.context + _ROUND) <= self.facts.spec.context

    def rate(self, load: Load, seconds: float) -> float:
        """Tokens per second of a load that is repeated for about `seconds`."""
        if load.kind == "prefill":
            return self._prefill(load.tokens, seconds)
        return self._decode(load, seconds)

    def step(self, load: Load) -> float:
        """Seconds of one step of a load: its first, or its whole prompt."""
        begin = time.perf_counter()
        if load.kind == "prefill":
            self._prompt(load.tokens)
        else:
            self._draw(load, 0)
        return time.perf_counter() - begin

    def fill(self, load: Load) -> None:
        """Compute what the streams of a decode have in the cache before its first token."""
        if load.kind == "prefill" or self._filled == load:
            return
        for table in self._tables(load):
            for begin in range(0, load.context, STEP_TOKENS):
                part = self.tokens(begin, min(STEP_TOKENS, load.context - begin))
                self.executor.step(batch([(part, begin, table)]), greedy(1))
        self._filled = load

    def _prefill(self, tokens: int, seconds: float) -> float:
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < seconds:
            self._prompt(tokens)
            done += tokens
        return done / (time.perf_counter() - begin)

    def _prompt(self, tokens: int) -> None:
        self._filled = None
        table = np.arange(-(-tokens // NativeExecutor.block_tokens), dtype=np.int32)
        for begin in range(0, tokens, STEP_TOKENS):
            part = self.tokens(begin, min(STEP_TOKENS, tokens - begin))
            self.executor.step(batch([(part, begin, table)]), greedy(1))

    def _decode(self, load: Load, seconds: float) -> float:
        self.fill(load)
        begin, steps = time.perf_counter(), 0
        while steps < _LEAST_STEPS or time.perf_counter() - begin < seconds:
            self._draw(load, steps)
            steps += 1
        return steps * load.streams / (time.perf_counter() - begin)

    def _draw(self, load: Load, step: int) -> None:
        at = load.context + step % _ROUND
        rows = [(self.tokens(step * 17 + s, 1), at, table) for s, table in enumerate(self._tables(load))]
        self.executor.step(batch(rows), greedy(load.streams))

    def _tables(self, load: Load) -> list[I32]:
        size = -(-(load.context + _ROUND) // NativeExecutor.block_tokens)
        return [np.arange(s * size, (s + 1) * size, dtype=np.int32) for s in range(load.streams)]

    def tokens(self, begin: int, count: int) -> I32:
        """Some tokens, different ones: a repeated one would stay in the cache as a row of the embedding."""
        return ((np.arange(begin, begin + count) * 7919 + 13) % self.program.vocab).astype(np.int32)


def batch(sequences: list[tuple[I32, int, I32]]) -> Batch:
    """One step of (new tokens, tokens in the cache, block table); each sequence draws one token."""
    size = NativeExecutor.block_tokens
    lengths = np.array([len(tokens) for tokens, _, _ in sequences], np.int32)
    tables = [table[: -(-(context + len(tokens)) // size)] for tokens, context, table in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Batch(
        tokens=np.concatenate([tokens for tokens, _, _ in sequences]),
        starts=starts,
        context=np.array([context for _, context, _ in sequences], np.int32),
        block_starts=np.concatenate([[0], np.cumsum([len(t) for t in tables])]).astype(np.int32),
        blocks=np.concatenate(tables),
        logit_rows=starts[1:] - 1,
    )


def greedy(rows: int) -> SamplingBatch:
    """Draw the likeliest token in each of the rows."""
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    whole, wide, none = np.zeros(rows, np.int32), np.zeros(rows, np.int64), np.zeros(0, np.int32)
    starts = np.zeros(rows + 1, np.int32)
    return SamplingBatch(
        temperature=zeros,
        top_k=whole,
        top_p=ones,
        min_p=zeros,
        repetition=ones,
        presence=zeros,
        frequency=zeros,
        seed=wide,
        position=wide,
        logprobs=whole - 1,
        history_starts=starts,
        history=none,
        history_output=whole,
        bias_starts=starts,
        bias_tokens=none,
        bias_values=np.zeros(0, np.float32),
    )
